/* A disk that fails, or a process that dies, at the n-th change of anything in one folder.

Preloaded into a program (LD_PRELOAD), it counts the calls that change files of that folder: create, write,
truncate, sync, rename, make a folder, remove. What happens at the n-th one, faults.py writes into a small file
that all processes of the program map, so the count is theirs together. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TEAR, ONCE, FULL, STOP };
enum { SPACE = 1, NAME = 2 };  /* what a call needs: room on the disk, or only an entry of its folder */

static struct plan {
    int64_t calls;     /* so far */
    int64_t at;        /* the one that fails, counted from 1 */
    int32_t mode;
    int32_t error;     /* the errno of a failure */
    int32_t hit;       /* whether it came so far */
    int32_t removals;  /* whether removing counts, too */
    char what[24];     /* the call that did */
    char where[4096];  /* the file */
    char folder[4096]; /* absolute, without links; empty: none */
} *plan;

__attribute__((constructor)) static void map_plan(void) {
    const char *path = getenv("PREFOPT_FAULTS");
    int file = path ? syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0) : -1;
    if (file < 0) return;
    void *found = mmap(NULL, sizeof(struct plan), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (found != MAP_FAILED) plan = found;
    syscall(SYS_close, file);
}

static int inside(const char *path) {
    size_t length = strlen(plan->folder);
    return length && !strncmp(path, plan->folder, length) && (path[length] == '/' || !path[length]);
}

/* Whether this call fails; *torn: it first writes one half of what it was given. */
static int fails(const char *what, int needs, const char *path, int *torn) {
    if (!inside(path)) return 0;
    int64_t call = __atomic_add_fetch(&plan->calls, 1, __ATOMIC_SEQ_CST);
    if (plan->mode == COUNT || call < plan->at) return 0;
    if (call == plan->at) {
        snprintf(plan->what, sizeof plan->what, "%s", what);
        snprintf(plan->where, sizeof plan->where, "%s", path);
        plan->hit = 1;
        if (plan->mode == KILL) kill(0, SIGKILL); /* the whole group: a program's steps die with it */
        if (plan->mode == TEAR) {
            if (torn) *torn = 1;
            else kill(0, SIGKILL);
            return 0;
        }
        if (plan->mode == STOP) { /* until faults.py lets it go on */
            kill(getpid(), SIGSTOP);
            return 0;
        }
    } else if (plan->mode != FULL || needs != SPACE)
        return 0;
    errno = plan->error;
    return 1;
}

static int fails_file(const char *what, int needs, int file, int *torn) {
    char link[64], path[PATH_MAX];
    if (!plan || !plan->folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(what, needs, path, torn);
}

static int fails_path(const char *what, int needs, int at, const char *name) {
    char path[2 * PATH_MAX], link[64];
    if (!plan || !plan->folder[0] || !name) return 0;
    if (name[0] == '/') return fails(what, needs, name, NULL);
    ssize_t length;
    if (at == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", at);
    length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX);
    if (length < 0) return 0;
    snprintf(path + length, PATH_MAX, "/%s", name);
    return fails(what, needs, path, NULL);
}

/* Writing */

#define BEGIN(what, file, half, whole)                  \
    int torn = 0;                                       \
    if (fails_file(what, SPACE, file, &torn)) return -1; \
    if (torn) {                                         \
        half;                                           \
        kill(0, SIGKILL);                               \
    }                                                   \
    return whole

ssize_t write(int file, const void *data, size_t size) {
    BEGIN("write", file, syscall(SYS_write, file, data, size / 2), syscall(SYS_write, file, data, size));
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) {
    BEGIN("pwrite", file, syscall(SYS_pwrite64, file, data, size / 2, offset),
          syscall(SYS_pwrite64, file, data, size, offset));
}

ssize_t pwrite(int file, const void *data, size_t size, off_t offset) {
    return pwrite64(file, data, size, offset);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    BEGIN("writev", file, syscall(SYS_write, file, parts[0].iov_base, parts[0].iov_len / 2),
          syscall(SYS_writev, file, parts, count));
}

ssize_t sendfile64(int file, int from, off64_t *offset, size_t size) {
    BEGIN("sendfile", file, syscall(SYS_sendfile, file, from, offset, size / 2),
          syscall(SYS_sendfile, file, from, offset, size));
}

ssize_t sendfile(int file, int from, off_t *offset, size_t size) { return sendfile64(file, from, offset, size); }

ssize_t copy_file_range(int from, off64_t *start, int file, off64_t *offset, size_t size, unsigned flags) {
    BEGIN("copy", file, syscall(SYS_copy_file_range, from, start, file, offset, size / 2, flags),
          syscall(SYS_copy_file_range, from, start, file, offset, size, flags));
}

int ftruncate64(int file, off64_t size) {
    return fails_file("truncate", SPACE, file, NULL) ? -1 : syscall(SYS_ftruncate, file, size);
}

int ftruncate(int file, off_t size) { return ftruncate64(file, size); }

int fsync(int file) { return fails_file("fsync", NAME, file, NULL) ? -1 : syscall(SYS_fsync, file); }

int fdatasync(int file) { return fails_file("fsync", NAME, file, NULL) ? -1 : syscall(SYS_fdatasync, file); }

/* Entries of folders */

static int open_any(int at, const char *path, int flags, mode_t mode) {
    if ((flags & O_CREAT) && fails_path("create", SPACE, at, path)) return -1;
    return syscall(SYS_openat, at, path, flags, mode);
}

#define MODE(flags)                        \
    mode_t mode = 0;                       \
    if (flags & (O_CREAT | __O_TMPFILE)) { \
        va_list rest;                      \
        va_start(rest, flags);             \
        mode = va_arg(rest, mode_t);       \
        va_end(rest);                      \
    }

int open(const char *path, int flags, ...) {
    MODE(flags);
    return open_any(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    MODE(flags);
    return open_any(AT_FDCWD, path, flags | O_LARGEFILE, mode);
}

int openat(int at, const char *path, int flags, ...) {
    MODE(flags);
    return open_any(at, path, flags, mode);
}

int openat64(int at, const char *path, int flags, ...) {
    MODE(flags);
    return open_any(at, path, flags | O_LARGEFILE, mode);
}

int mkdir(const char *path, mode_t mode) {
    return fails_path("mkdir", SPACE, AT_FDCWD, path) ? -1 : syscall(SYS_mkdirat, AT_FDCWD, path, mode);
}

int rename(const char *from, const char *to) {
    if (fails_path("rename", NAME, AT_FDCWD, to)) return -1;
    return syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int renameat(int from_at, const char *from, int to_at, const char *to) {
    return fails_path("rename", NAME, to_at, to) ? -1 : syscall(SYS_renameat2, from_at, from, to_at, to, 0);
}

/* Removing needs no room: it can be the moment of a kill, but never fails. */

static void removing(int at, const char *path) {
    if (plan && plan->removals) fails_path("remove", NAME, at, path);
}

int unlink(const char *path) {
    removing(AT_FDCWD, path);
    return syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}

int unlinkat(int at, const char *path, int flags) {
    removing(at, path);
    return syscall(SYS_unlinkat, at, path, flags);
}

int rmdir(const char *path) {
    removing(AT_FDCWD, path);
    return syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR);
}
