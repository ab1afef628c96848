/* What the kernel alone takes to run a program to its end in the ways that a sandbox does.

   floor ROUNDS FILTER PROGRAM [CGROUP...]

   FILTER holds instructions of seccomp(2), each CGROUP is a folder of one hierarchy in which
   groups can be made. Every way takes its turn in each round and has its output captured by two
   pipes. Prints "NAME NANOSECONDS" for each run. None of our code takes part, and nothing is
   checked, recorded or limited: whoever confines by these means takes at least as long. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MOST_GROUPS 8
#define MOST_INSTRUCTIONS 4096
#define PATH_BYTES 512

struct way {
    const char *name;
    int namespaces;
    bool ahead, layers, grouped;
};

/* A sandbox has a first process, which reaps and reports, and below it the program. */
struct tree {
    pid_t first;
    int control, report, output[2];
};

static struct sock_filter instructions[MOST_INSTRUCTIONS];
static struct sock_fprog filter = {.filter = instructions};
static int ruleset;
static char *program;
static char **groups;
static int group_count;

static const int APART = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS |
                         CLONE_NEWCGROUP;

static void fail(const char *what)
{
    fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void pipes(int reading[2], int writing[2])
{
    for (int at = 0; at < 2; at++) {
        int ends[2];
        if (pipe2(ends, O_CLOEXEC))
            fail("pipe2");
        reading[at] = ends[0];
        writing[at] = ends[1];
    }
}

static void drain(int reading[2])
{
    char data[4096];
    for (int at = 0; at < 2; at++) {
        while (read(reading[at], data, sizeof data) > 0)
            ;
        close(reading[at]);
    }
}

static void spawn(void)
{
    int reading[2], writing[2], status;
    char *argv[] = {program, NULL}, *none[] = {NULL};
    posix_spawn_file_actions_t actions;
    pid_t pid;
    pipes(reading, writing);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, writing[0], 1);
    posix_spawn_file_actions_adddup2(&actions, writing[1], 2);
    if (posix_spawn(&pid, program, &actions, NULL, argv, none))
        fail("posix_spawn");
    posix_spawn_file_actions_destroy(&actions);
    close(writing[0]);
    close(writing[1]);
    drain(reading);
    if (waitpid(pid, &status, 0) != pid || status)
        fail("the program failed unconfined");
}

/* The same in every process below this one, whose own number is another one there. */
static pid_t owner;

static char *group(int at, const char *file)
{
    static char path[PATH_BYTES];
    snprintf(path, sizeof path, "%s/floor-%d%s", groups[at], owner, file);
    return path;
}

static void make_groups(void)
{
    owner = getpid();
    for (int at = 0; at < group_count; at++)
        if (mkdir(group(at, ""), 0755))
            fail(group(at, ""));
}

/* Version 1 knows a file for threads, through which a process of one waits for nobody's fork. */
static void join_groups(void)
{
    for (int at = 0; at < group_count; at++) {
        int file = open(group(at, "/tasks"), O_WRONLY | O_CLOEXEC);
        if (file < 0)
            file = open(group(at, "/cgroup.procs"), O_WRONLY | O_CLOEXEC);
        if (file < 0 || write(file, "0", 1) != 1)
            fail(group(at, ""));
        close(file);
    }
}

static void remove_groups(void)
{
    /* The last process may still be on its way out. */
    for (int at = 0; at < group_count; at++)
        while (rmdir(group(at, "")) && errno == EBUSY)
            usleep(50);
}

static void confine(void)
{
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
        syscall(SYS_landlock_restrict_self, ruleset, 0) ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter))
        fail("the layers");
}

static void become(const struct way *way, int control, int writing[2])
{
    char *argv[] = {program, NULL}, *none[] = {NULL}, told;
    if (way->layers)
        confine();
    if (write(control, "r", 1) != 1 || read(control, &told, 1) != 1)
        _exit(1);
    dup2(writing[0], 1);
    dup2(writing[1], 2);
    execve(program, argv, none);
    _exit(127);
}

static void begin(const struct way *way, struct tree *tree)
{
    int writing[2], control[2], report[2], status;
    pipes(tree->output, writing);
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, control) || pipe2(report, O_CLOEXEC))
        fail("socketpair");
    if (way->grouped)
        make_groups();
    tree->first = syscall(SYS_clone, way->namespaces | SIGCHLD, NULL, NULL, NULL, NULL);
    if (tree->first < 0)
        fail("clone");
    if (tree->first == 0) {
        if (way->grouped)
            join_groups();
        pid_t stub = fork();
        if (stub == 0)
            become(way, control[1], writing);
        close(writing[0]);
        close(writing[1]);
        close(control[0]);
        close(control[1]);
        if (waitpid(stub, &status, 0) != stub)
            status = -1;
        _exit(write(report[1], &status, sizeof status) != sizeof status);
    }
    close(writing[0]);
    close(writing[1]);
    close(control[1]);
    close(report[1]);
    tree->control = control[0];
    tree->report = report[0];
}

static void ready(struct tree *tree)
{
    char told;
    if (read(tree->control, &told, 1) != 1)
        fail("the program was not reached");
}

static void finish(struct tree *tree)
{
    int status = -1;
    if (write(tree->control, "g", 1) != 1)
        fail("telling it");
    drain(tree->output);
    if (read(tree->report, &status, sizeof status) != sizeof status || status)
        fail("the program failed confined");
}

static void end(const struct way *way, struct tree *tree)
{
    waitpid(tree->first, NULL, 0);
    close(tree->control);
    close(tree->report);
    if (way->grouped)
        remove_groups();
}

static long long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static long long timed(const struct way *way)
{
    struct tree tree;
    if (way->ahead) {
        begin(way, &tree);
        ready(&tree);
        usleep(300); /* asleep, as what waits for long is */
    }
    long long begun = now();
    if (!way->namespaces) {
        spawn();
        return now() - begun;
    }
    if (!way->ahead) {
        begin(way, &tree);
        ready(&tree);
    }
    finish(&tree);
    long long taken = now() - begun;
    end(way, &tree);
    return taken;
}

static void prepare(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        fail(path);
    filter.len = fread(instructions, sizeof *instructions, MOST_INSTRUCTIONS, file);
    fclose(file);
    struct landlock_ruleset_attr handled = {.handled_access_fs = (1ULL << 15) - 1};
    ruleset = syscall(SYS_landlock_create_ruleset, &handled, sizeof handled, 0);
    struct landlock_path_beneath_attr everything = {
        .allowed_access = LANDLOCK_ACCESS_FS_EXECUTE | LANDLOCK_ACCESS_FS_READ_FILE |
                          LANDLOCK_ACCESS_FS_READ_DIR,
        .parent_fd = open("/", O_PATH | O_CLOEXEC),
    };
    if (ruleset < 0 ||
        syscall(SYS_landlock_add_rule, ruleset, LANDLOCK_RULE_PATH_BENEATH, &everything, 0))
        fail("landlock");
}

int main(int count, char **arguments)
{
    const struct way ways[] = {
        {.name = "spawn"},
        {.name = "waiting", .namespaces = APART, .ahead = true},
        {.name = "waiting_confined", .namespaces = APART, .ahead = true, .layers = true},
        {.name = "made", .namespaces = APART},
        {.name = "made_confined", .namespaces = APART, .layers = true},
        {.name = "made_network", .namespaces = APART | CLONE_NEWNET, .layers = true},
        {.name = "made_grouped", .namespaces = APART, .layers = true, .grouped = true},
    };
    if (count < 4 || count > 4 + MOST_GROUPS)
        return 2;
    prepare(arguments[2]);
    program = arguments[3];
    groups = arguments + 4;
    group_count = count - 4;
    for (int round = atoi(arguments[1]); round >= 0; round--)
        for (size_t at = 0; at < sizeof ways / sizeof *ways; at++) {
            if (ways[at].grouped && !group_count)
                continue;
            long long taken = timed(&ways[at]);
            /* The first round warms up. */
            if (round < atoi(arguments[1]))
                printf("%s %lld\n", ways[at].name, taken);
        }
    return 0;
}
