"""Programs that run others: what `argv` cannot bound."""

from __future__ import annotations

from typing import Final

# Programs whose arguments, configuration or input make them run other programs.
_NAMES: Final = """
    ash awk bash bun busybox cargo csh dash deno docker ed emacs env find fish gawk gcc gdb git
    go gradle java just ksh less make man more mvn nice node nohup npm npx nsenter parallel perl
    php pip pip3 pnpm pytest python python3 rsync ruby sed sh ssh stdbuf strace sudo su tar
    timeout tsx unshare uv uvx vi vim watch xargs yarn zsh
    """
RUNS_OTHERS: Final = frozenset(_NAMES.split())
