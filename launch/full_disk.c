/* A disk that is full from some write on, or a process that is killed at it, for launch/faults.py.

   To be preloaded (LD_PRELOAD). It counts the writes to files below one directory, and the making of files and
   directories there. Without `full_disk` having been called nothing is changed. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char place[PATH_MAX];
static long allowed = -1;
static long seen;
static int deadly;

/* The first `most` writes below `below` go through; -1: all. The next one, and all behind it, find no room, or (kills)
   the process is killed at it. */
void full_disk(const char *below, long most, int kills) {
  snprintf(place, sizeof place, "%s", below);
  seen = 0;
  allowed = most;
  deadly = kills;
}

long full_disk_seen(void) { return __atomic_load_n(&seen, __ATOMIC_SEQ_CST); }

/* Processes that are started anew have the directory from their environment: "most kills directory". */
__attribute__((constructor)) static void from_environment(void) {
  const char *given = getenv("FULL_DISK");
  int used = 0;
  if (given && sscanf(given, "%ld %d %n", &allowed, &deadly, &used) == 2)
    snprintf(place, sizeof place, "%s", given + used);
}

static int refused(const char *path) {
  size_t length = strlen(place);
  if (!length || strncmp(path, place, length) || (path[length] != '/' && path[length])) return 0;
  long number = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
  if (allowed < 0 || number <= allowed) return 0;
  if (deadly) {
    killpg(0, SIGKILL);
    kill(getpid(), SIGKILL);
  }
  errno = ENOSPC;
  return 1;
}

static int refused_file(int file) {
  char link[64], path[PATH_MAX];
  if (!place[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return refused(path);
}

static int refused_name(int folder, const char *name) {
  char path[PATH_MAX], link[64];
  if (!place[0]) return 0;
  if (name[0] == '/') return refused(name);
  if (folder == AT_FDCWD) {
    if (!getcwd(path, sizeof path)) return 0;
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
  }
  size_t length = strlen(path);
  snprintf(path + length, sizeof path - length, "/%s", name);
  return refused(path);
}

#define WRITES(type, name, parameters, arguments)                         \
  type name parameters {                                                  \
    static type(*real) parameters;                                        \
    if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name);        \
    return refused_file(file) ? -1 : real arguments;                      \
  }

WRITES(ssize_t, write, (int file, const void *data, size_t size), (file, data, size))
WRITES(ssize_t, pwrite, (int file, const void *data, size_t size, off_t at), (file, data, size, at))
WRITES(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t at), (file, data, size, at))
WRITES(ssize_t, writev, (int file, const struct iovec *data, int count), (file, data, count))
WRITES(ssize_t, pwritev, (int file, const struct iovec *data, int count, off_t at), (file, data, count, at))
WRITES(ssize_t, pwritev64, (int file, const struct iovec *data, int count, off64_t at), (file, data, count, at))
WRITES(ssize_t, sendfile, (int file, int from, off_t *at, size_t size), (file, from, at, size))
WRITES(ssize_t, sendfile64, (int file, int from, off64_t *at, size_t size), (file, from, at, size))
WRITES(ssize_t, copy_file_range, (int from, off64_t *at, int file, off64_t *to, size_t size, unsigned flags),
       (from, at, file, to, size, flags))

int mkdir(const char *name, mode_t mode) {
  static int (*real)(const char *, mode_t);
  if (!real) real = (int (*)(const char *, mode_t))dlsym(RTLD_NEXT, "mkdir");
  return access(name, F_OK) && refused_name(AT_FDCWD, name) ? -1 : real(name, mode);
}

int mkdirat(int folder, const char *name, mode_t mode) {
  static int (*real)(int, const char *, mode_t);
  if (!real) real = (int (*)(int, const char *, mode_t))dlsym(RTLD_NEXT, "mkdirat");
  return faccessat(folder, name, F_OK, 0) && refused_name(folder, name) ? -1 : real(folder, name, mode);
}

/* The mode follows the flags where a file may be made. */
#define MODE(flags)                                                     \
  mode_t mode = 0;                                                      \
  if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) {        \
    va_list more;                                                       \
    va_start(more, flags);                                              \
    mode = va_arg(more, mode_t);                                        \
    va_end(more);                                                       \
  }

#define OPENS(name)                                                                              \
  int name(const char *path, int flags, ...) {                                                   \
    static int (*real)(const char *, int, ...);                                                  \
    MODE(flags)                                                                                  \
    if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name);                  \
    if (flags & O_CREAT && access(path, F_OK) && refused_name(AT_FDCWD, path)) return -1;        \
    return real(path, flags, mode);                                                              \
  }

#define OPENS_AT(name)                                                                           \
  int name(int folder, const char *path, int flags, ...) {                                       \
    static int (*real)(int, const char *, int, ...);                                             \
    MODE(flags)                                                                                  \
    if (!real) real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #name);             \
    if (flags & O_CREAT && faccessat(folder, path, F_OK, 0) && refused_name(folder, path))       \
      return -1;                                                                                 \
    return real(folder, path, flags, mode);                                                      \
  }

OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)
