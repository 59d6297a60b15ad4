/* Has one read of a save fail with EIO, when a file asks for it.

   Loaded before the C library by LD_PRELOAD. Whoever removes the file
   $DTRAIN_CHAOS_DIR/eio, of all processes, is the one whose read fails. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fails(int file) {
  static char order[PATH_MAX];
  char link[32], path[PATH_MAX];
  int before = errno, failing = 0;
  if (!*order) {
    const char* directory = getenv("DTRAIN_CHAOS_DIR");
    if (!directory) return 0;
    snprintf(order, sizeof order, "%s/eio", directory);
  }
  if (access(order, F_OK) == 0) {
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, path, sizeof path - 1);
    path[size > 0 ? size : 0] = 0;
    failing = strstr(path, "/ckpt-") && unlink(order) == 0;
  }
  errno = failing ? EIO : before;
  return failing;
}

ssize_t read(int file, void* data, size_t size) {
  static ssize_t (*next)(int, void*, size_t);
  if (!next) next = dlsym(RTLD_NEXT, "read");
  return fails(file) ? -1 : next(file, data, size);
}

ssize_t pread(int file, void* data, size_t size, off_t at) {
  static ssize_t (*next)(int, void*, size_t, off_t);
  if (!next) next = dlsym(RTLD_NEXT, "pread");
  return fails(file) ? -1 : next(file, data, size, at);
}

ssize_t pread64(int file, void* data, size_t size, off64_t at) {
  static ssize_t (*next)(int, void*, size_t, off64_t);
  if (!next) next = dlsym(RTLD_NEXT, "pread64");
  return fails(file) ? -1 : next(file, data, size, at);
}
