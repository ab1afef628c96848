#!/bin/sh
# Process 1 once the root is up: runs the checks, reaps orphans, turns the machine off.
# `start.sh PYTHON CHECKOUT BOOT`
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
stty raw -echo </dev/ttyS1
cd "$2" && "$1" -B -m tests.vm.inside.main "$3" </dev/null >/dev/console 2>&1
echo "start.sh: the checks ended with $?" >/dev/kmsg
sync
echo o >/proc/sysrq-trigger
sleep 60
