/* A clock that can be moved, for one process, from outside.
 *
 * Preloaded into a node, it stands between the process and everything in libc that tells the time or waits for it.
 * What it tells is
 *
 *     told = real + drift(real) [+ shift, for the wall clock]
 *
 * where drift is 0 until a moment that the harness sets, and grows or shrinks at a constant rate from there. The
 * parameters stand in a page that the harness writes (the layout is `Page`, repeated in clock.rs) and that is mapped
 * here. Waits are turned back into real time, so that a process whose clock runs at double speed also has timers that
 * run at double speed: a slow or fast clock moves timers and time stamps alike, as a bad oscillator does.
 *
 * It allocates nothing and calls no other function of libc before main: the allocator reads the clock while it starts.
 * Time that a CPU was used for is left alone, and so are times of files, which the kernel makes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>

#define SECOND 1000000000LL
#define MAGIC 0x636c6f636b303031ULL

struct page {
  uint64_t magic;
  uint64_t sequence;    /* odd while the harness writes */
  int64_t from;         /* real monotonic time from which `rate_after` holds */
  int64_t drift_at;     /* told minus real at `from` */
  int64_t rate_before;  /* millionths; 1000000 is the right speed */
  int64_t rate_after;
  int64_t shift;        /* of the wall clock, besides the drift */
  uint64_t wall_reads;  /* written here: how often the wall clock was told, */
  int64_t wall_error;   /* how far it was from the real one, the last time, */
  uint64_t mono_reads;  /* and the same of the monotonic clock */
  int64_t mono_error;
};

static struct page *page_mapped;
static int page_missing;

#if defined(__x86_64__)
static long raw(long number, long a, long b, long c, long d, long e, long f) {
  long result;
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  register long r9 __asm__("r9") = f;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
  return result;
}
#define COND_VERSION "GLIBC_2.3.2"
#elif defined(__aarch64__)
static long raw(long number, long a, long b, long c, long d, long e, long f) {
  register long x8 __asm__("x8") = number;
  register long x0 __asm__("x0") = a;
  register long x1 __asm__("x1") = b;
  register long x2 __asm__("x2") = c;
  register long x3 __asm__("x3") = d;
  register long x4 __asm__("x4") = e;
  register long x5 __asm__("x5") = f;
  __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
  return x0;
}
#define COND_VERSION "GLIBC_2.17"
#else
#error "no system call is written down for this architecture"
#endif

static long answer(long result) {
  if (result >= -4095 && result < 0) {
    errno = (int)-result;
    return -1;
  }
  return result;
}

extern char **environ;

/* getenv, without calling it: it may be replaced or not yet usable. */
static const char *page_name(void) {
  static const char key[] = "CLOCK_PAGE=";
  for (char **entry = environ; entry && *entry; entry++) {
    size_t at = 0;
    while (key[at] && (*entry)[at] == key[at]) at++;
    if (!key[at]) return *entry + at;
  }
  return 0;
}

static struct page *page(void) {
  struct page *known = __atomic_load_n(&page_mapped, __ATOMIC_ACQUIRE);
  if (known || !environ || page_missing) return known;
  const char *name = page_name();
  long fd = name ? raw(SYS_openat, AT_FDCWD, (long)name, O_RDWR | O_CLOEXEC, 0, 0, 0) : -1;
  if (fd < 0) {
    page_missing = 1;
    return 0;
  }
  long at = raw(SYS_mmap, 0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  raw(SYS_close, fd, 0, 0, 0, 0, 0);
  struct page *mapped = (struct page *)at;
  if ((at < 0 && at >= -4095) || mapped->magic != MAGIC) {
    page_missing = 1;
    return 0;
  }
  __atomic_store_n(&page_mapped, mapped, __ATOMIC_RELEASE);
  return mapped;
}

static int64_t nanos(const struct timespec *t) { return t->tv_sec * SECOND + t->tv_nsec; }

static void split(int64_t at, struct timespec *t) {
  t->tv_sec = at / SECOND;
  t->tv_nsec = at % SECOND;
  if (t->tv_nsec < 0) {
    t->tv_nsec += SECOND;
    t->tv_sec -= 1;
  }
}

static int64_t real(clockid_t id) {
  struct timespec t = {0, 0};
  raw(SYS_clock_gettime, id, (long)&t, 0, 0, 0, 0);
  return nanos(&t);
}

/* The parameters, as they were at one moment. */
struct now {
  int64_t mono;  /* real */
  int64_t drift; /* told minus real */
  int64_t rate;  /* of the told clock, at `mono` */
  int64_t shift;
};

static struct now observe(struct page *p) {
  struct now now = {0, 0, 1000000, 0};
  uint64_t before, after;
  do {
    before = __atomic_load_n(&p->sequence, __ATOMIC_ACQUIRE);
    now.mono = real(CLOCK_MONOTONIC);
    int64_t from = p->from, drift = p->drift_at;
    now.rate = now.mono < from ? p->rate_before : p->rate_after;
    now.drift = drift + (int64_t)((__int128)(now.mono - from) * (now.rate - 1000000) / 1000000);
    now.shift = p->shift;
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    after = __atomic_load_n(&p->sequence, __ATOMIC_RELAXED);
  } while (before != after || (before & 1));
  return now;
}

static int is_wall(clockid_t id) { return id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE || id == CLOCK_TAI; }

static int is_moved(clockid_t id) {
  return is_wall(id) || id == CLOCK_MONOTONIC || id == CLOCK_MONOTONIC_COARSE || id == CLOCK_MONOTONIC_RAW ||
         id == CLOCK_BOOTTIME;
}

int clock_gettime(clockid_t id, struct timespec *t) {
  long result = raw(SYS_clock_gettime, id, (long)t, 0, 0, 0, 0);
  struct page *p = result == 0 && is_moved(id) ? page() : 0;
  if (!p) return (int)answer(result);
  struct now now = observe(p);
  int64_t error = now.drift + (is_wall(id) ? now.shift : 0);
  /* The plain monotonic clock is read together with its parameters, so that it never goes back. */
  int64_t base = id == CLOCK_MONOTONIC ? now.mono : nanos(t);
  split(base + error, t);
  __atomic_fetch_add(is_wall(id) ? &p->wall_reads : &p->mono_reads, 1, __ATOMIC_RELAXED);
  __atomic_store_n(is_wall(id) ? &p->wall_error : &p->mono_error, error, __ATOMIC_RELAXED);
  return 0;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone) {
  struct timespec now;
  (void)zone;
  if (!t) return 0;
  int result = clock_gettime(CLOCK_REALTIME, &now);
  t->tv_sec = now.tv_sec;
  t->tv_usec = now.tv_nsec / 1000;
  return result;
}

time_t time(time_t *t) {
  struct timespec now = {0, 0};
  clock_gettime(CLOCK_REALTIME, &now);
  if (t) *t = now.tv_sec;
  return now.tv_sec;
}

/* How long `told` nanoseconds of the told clock are in reality, rounded up. */
static int64_t stretched(const struct now *now, int64_t told) {
  if (told <= 0 || now->rate == 1000000) return told;
  __int128 real = ((__int128)told * 1000000 + now->rate - 1) / now->rate;
  return real > INT64_MAX ? INT64_MAX : (int64_t)real;
}

/* The real moment of a deadline on the told clock `id`. */
static void deadline(clockid_t id, const struct timespec *told, struct timespec *to) {
  struct page *p = page();
  *to = *told;
  if (!p || !is_moved(id) || told->tv_sec < 0 || told->tv_sec > INT64_MAX / SECOND / 2) return;
  struct now now = observe(p);
  int64_t error = now.drift + (is_wall(id) ? now.shift : 0);
  if (error == 0 && now.rate == 1000000) return;
  int64_t real_now = id == CLOCK_MONOTONIC ? now.mono : real(id);
  int64_t at = real_now + stretched(&now, nanos(told) - (real_now + error));
  split(at < 0 ? 0 : at, to);
}

/* The real length of a wait on the told clock. */
static void span(const struct timespec *told, struct timespec *to) {
  struct page *p = page();
  *to = *told;
  if (!p || told->tv_sec < 0 || told->tv_sec > INT64_MAX / SECOND / 4) return;
  struct now now = observe(p);
  split(stretched(&now, nanos(told)), to);
}

static int span_ms(int told) {
  struct page *p = told > 0 ? page() : 0;
  if (!p) return told;
  struct now now = observe(p);
  int64_t real = (stretched(&now, told * 1000000LL) + 999999) / 1000000;
  return real > INT_MAX ? INT_MAX : (int)real;
}

int epoll_pwait(int fd, struct epoll_event *events, int max, int timeout, const sigset_t *mask) {
  return (int)answer(raw(SYS_epoll_pwait, fd, (long)events, max, span_ms(timeout), (long)mask, _NSIG / 8));
}

int epoll_wait(int fd, struct epoll_event *events, int max, int timeout) {
  return epoll_pwait(fd, events, max, timeout, 0);
}

int poll(struct pollfd *fds, nfds_t count, int timeout) {
  struct timespec limit = {0, 0};
  int real = span_ms(timeout);
  split(real * 1000000LL, &limit);
  return (int)answer(raw(SYS_ppoll, (long)fds, (long)count, real < 0 ? 0 : (long)&limit, 0, _NSIG / 8, 0));
}

int clock_nanosleep(clockid_t id, int flags, const struct timespec *request, struct timespec *remain) {
  struct timespec real = {0, 0};
  if (flags & TIMER_ABSTIME) {
    deadline(id, request, &real);
  } else {
    span(request, &real);
  }
  return (int)-raw(SYS_clock_nanosleep, id, flags, (long)&real, (long)remain, 0, 0);
}

int nanosleep(const struct timespec *request, struct timespec *remain) {
  int error = clock_nanosleep(CLOCK_MONOTONIC, 0, request, remain);
  if (error) errno = error;
  return error ? -1 : 0;
}

/* Rust's own locks, and parking_lot's, wait by this. */
long syscall(long number, ...) {
  long a[6];
  va_list list;
  va_start(list, number);
  for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
  va_end(list);
  struct timespec real;
  const struct timespec *told = (const struct timespec *)a[3];
  int operation = (int)a[1] & FUTEX_CMD_MASK;
  if (number == SYS_futex && told && (operation == FUTEX_WAIT || operation == FUTEX_WAIT_BITSET)) {
    int wall = ((int)a[1] & FUTEX_CLOCK_REALTIME) != 0;
    if (operation == FUTEX_WAIT) {
      span(told, &real);
    } else {
      deadline(wall ? CLOCK_REALTIME : CLOCK_MONOTONIC, told, &real);
    }
    a[3] = (long)&real;
  }
  return answer(raw(number, a[0], a[1], a[2], a[3], a[4], a[5]));
}

/* C++ waits by these. Which clock a condition variable counts by cannot be asked of it; the library that matters here
 * makes them with the default, the wall clock, and uses the call below for the other. */
typedef int (*timed_fn)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
typedef int (*clocked_fn)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);

int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
  static timed_fn known;
  timed_fn next = __atomic_load_n(&known, __ATOMIC_RELAXED);
  if (!next) {
    next = (timed_fn)dlvsym(RTLD_NEXT, "pthread_cond_timedwait", COND_VERSION);
    if (!next) next = (timed_fn)dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    __atomic_store_n(&known, next, __ATOMIC_RELAXED);
  }
  struct timespec real;
  deadline(CLOCK_REALTIME, until, &real);
  return next(cond, mutex, &real);
}

int pthread_cond_clockwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex, clockid_t id,
                           const struct timespec *restrict until) {
  static clocked_fn known;
  clocked_fn next = __atomic_load_n(&known, __ATOMIC_RELAXED);
  if (!next) {
    next = (clocked_fn)dlsym(RTLD_NEXT, "pthread_cond_clockwait");
    __atomic_store_n(&known, next, __ATOMIC_RELAXED);
  }
  struct timespec real;
  deadline(id, until, &real);
  return next(cond, mutex, id, &real);
}
