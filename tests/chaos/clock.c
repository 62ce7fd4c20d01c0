/* Preloaded into a redis-server: its wall clock, which times its keys, runs at another rate and can
 * be set forward. libfaketime cannot be used: it does not start together with jemalloc.
 *
 * CLOCK_PPM: how many millionths faster it runs, from the start of the process on.
 * CLOCK_STEP: a file with one 64-bit number, by how many nanoseconds it is set forward at present.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int64_t ppm, start;
static volatile int64_t *step;

static int64_t real(void) {
  struct timespec t;
  syscall(SYS_clock_gettime, CLOCK_REALTIME, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

__attribute__((constructor)) static void begin(void) {
  const char *rate = getenv("CLOCK_PPM"), *file = getenv("CLOCK_STEP");
  int fd = file ? open(file, O_RDONLY) : -1;
  if (fd >= 0) {
    void *map = mmap(0, sizeof *step, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (map != MAP_FAILED) step = map;
  }
  start = real();
  ppm = rate ? atoll(rate) : 0;
}

static int64_t now(void) {
  int64_t t = real();
  if (start) t += (t - start) / 1000 * ppm / 1000;
  return t + (step ? *step : 0);
}

int clock_gettime(clockid_t clock, struct timespec *t) {
  if (clock != CLOCK_REALTIME && clock != CLOCK_REALTIME_COARSE)
    return syscall(SYS_clock_gettime, clock, t);
  int64_t n = now();
  t->tv_sec = n / 1000000000;
  t->tv_nsec = n % 1000000000;
  return 0;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone) {
  (void)zone;
  int64_t n = now();
  t->tv_sec = n / 1000000000;
  t->tv_usec = n % 1000000000 / 1000;
  return 0;
}

time_t time(time_t *out) {
  time_t t = now() / 1000000000;
  if (out) *out = t;
  return t;
}
