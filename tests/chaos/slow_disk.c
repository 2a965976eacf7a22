/* Preloaded, it makes each call that writes to a file below $SLOW_BELOW take a fifth of a second longer, and notes it in
   $SLOW_NOTES: a line with "main" or "other", for the thread, the call, and the file. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static void slow(const char *call, int file, const char *path) {
    const char *below = getenv("SLOW_BELOW"), *notes = getenv("SLOW_NOTES");
    char link[64], name[PATH_MAX] = "", line[PATH_MAX + 64];
    if (!below || !notes) return;
    if (path) {
        snprintf(name, sizeof name, "%s", path);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", file);
        if (readlink(link, name, sizeof name - 1) < 0) return;
    }
    if (strncmp(name, below, strlen(below))) return;
    const char *thread = syscall(SYS_gettid) == getpid() ? "main" : "other";
    int length = snprintf(line, sizeof line, "%s %s %s\n", thread, call, name);
    int out = open(notes, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    syscall(SYS_write, out, line, length);
    close(out);
    usleep(200000);
}

#define SLOWED(type, name, parameters, arguments, file, path) \
    type name parameters { \
        static type(*real) parameters; \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        slow(#name, file, path); \
        return real arguments; \
    }

SLOWED(ssize_t, write, (int f, const void *data, size_t n), (f, data, n), f, NULL)
SLOWED(ssize_t, pwrite, (int f, const void *data, size_t n, off_t at), (f, data, n, at), f, NULL)
SLOWED(ssize_t, pwrite64, (int f, const void *data, size_t n, off64_t at), (f, data, n, at), f, NULL)
SLOWED(ssize_t, writev, (int f, const struct iovec *data, int n), (f, data, n), f, NULL)
SLOWED(int, fsync, (int f), (f), f, NULL)
SLOWED(int, fdatasync, (int f), (f), f, NULL)
SLOWED(int, rename, (const char *from, const char *to), (from, to), -1, from)
SLOWED(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), a, from)
