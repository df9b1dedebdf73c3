/* A disk that fails when it is told to: put before libc by LD_PRELOAD, told by ctypes.
 *
 * Only files whose path begins with a given prefix are touched. Writes are also kept in a log if
 * that is asked for, each fsync with them: what a loss of power would leave is made from it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char prefix[PATH_MAX];
static int error;            /* what a write fails with; 0 for none */
static long writes;          /* how many more succeed */
static int64_t size;         /* how long a file may become; negative for no bound */
static int syncs_fail;       /* whether it is the fsyncs that fail, and not the writes */
static long failures;        /* how often anything failed */
static long own_failures;    /* without files that take another's place later, or whose place was taken */
static int journal = -1;     /* where writes are logged */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void disk_fail(const char *path, int number, long after, int64_t longest, int at_sync) {
    snprintf(prefix, sizeof prefix, "%s", path);
    error = number, writes = after, size = longest, syncs_fail = at_sync;
    failures = own_failures = 0;
}

long disk_failures(void) { return failures; }

long disk_own_failures(void) { return own_failures; }

void disk_log(const char *path, int descriptor) {
    snprintf(prefix, sizeof prefix, "%s", path);
    journal = descriptor;
}

static int find_path(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length > 0) path[length] = 0;
    return length > 0;
}

static int is_ours(int descriptor) {
    char path[PATH_MAX];
    return *prefix && find_path(descriptor, path) && !strncmp(path, prefix, strlen(prefix));
}

static void count_failure(int descriptor) {
    char path[PATH_MAX];
    struct stat status;
    failures++;
    if (!fstat(descriptor, &status) && !status.st_nlink) return; /* another has taken its place */
    /* A file that has taken its place has lost its first name: Linux adds "(deleted)" to that. */
    if (!find_path(descriptor, path) || !strstr(path, ".new-") || strstr(path, " (deleted)")) {
        own_failures++;
    }
}

/* offset, length (-1 for an fsync), inode, bytes */
static void note(int descriptor, int64_t offset, int64_t length, const void *bytes) {
    static ssize_t (*next)(int, const void *, size_t);
    if (!next) next = dlsym(RTLD_NEXT, "write");
    struct stat status;
    fstat(descriptor, &status);
    int64_t head[3] = {offset, length, status.st_ino};
    pthread_mutex_lock(&lock);
    next(journal, head, sizeof head);
    if (length > 0) next(journal, bytes, length);
    pthread_mutex_unlock(&lock);
}

/* How many of these bytes may be written; -1 with errno for none. */
static ssize_t allowed(int descriptor, size_t count, off_t offset) {
    if (!is_ours(descriptor)) return count;
    if (!error || syncs_fail) return count;
    if (size >= 0) {
        if (offset + (off_t)count <= size) return count;
        count_failure(descriptor);
        if (offset < size) return size - offset;
    } else if (writes-- > 0) {
        return count;
    } else {
        count_failure(descriptor);
    }
    errno = error;
    return -1;
}

#define PWRITE(name) \
    ssize_t name(int descriptor, const void *bytes, size_t count, off_t offset) { \
        static ssize_t (*next)(int, const void *, size_t, off_t); \
        if (!next) next = dlsym(RTLD_NEXT, #name); \
        ssize_t some = allowed(descriptor, count, offset); \
        if (some < 0) return some; \
        ssize_t done = next(descriptor, bytes, some, offset); \
        if (journal >= 0 && done > 0 && is_ours(descriptor)) note(descriptor, offset, done, bytes); \
        return done; \
    }

PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t write(int descriptor, const void *bytes, size_t count) {
    static ssize_t (*next)(int, const void *, size_t);
    if (!next) next = dlsym(RTLD_NEXT, "write");
    ssize_t some = count;
    if (*prefix && is_ours(descriptor)) {
        off_t offset = lseek(descriptor, 0, SEEK_CUR);
        some = allowed(descriptor, count, offset);
        if (some < 0) return some;
        if (journal >= 0) note(descriptor, offset, some, bytes);
    }
    return next(descriptor, bytes, some);
}

int fsync(int descriptor) {
    static int (*next)(int);
    if (!next) next = dlsym(RTLD_NEXT, "fsync");
    if (is_ours(descriptor)) {
        if (error && syncs_fail && writes-- <= 0) {
            count_failure(descriptor);
            errno = error;
            return -1;
        }
        if (journal >= 0) note(descriptor, 0, -1, NULL);
    }
    return next(descriptor);
}
