// SPDX-License-Identifier: Apache-2.0
//
// witness: the lab guest's only program. It keeps writing numbered records to all its disks,
// remembers in RAM what each block must hold, reads blocks back and compares. The memory moves with
// the guest, so after a move the memory of what was written meets the disk that was copied: a lost
// or a stale write shows as a mismatch.
//
// It runs in two places:
//   - as /init (PID 1) of the guest: settings on the kernel command line, reports on ttyS0,
//   commands from
//     ttyS1;
//   - on the machine: `witness --fill` makes an image's initial content, `witness --check` scans an
//   image.
//
// A disk is a row of units (default 4096 bytes). A unit's content follows from (disk name, unit
// number, sequence number) alone, so the model is one number per unit and a mismatch can say which
// older record was found in its place. The initial content made by --fill has sequence number 1.
//
// Kernel command line (sizes take K, M, G; w.NAME.key sets one disk, w.key sets all of them):
//   w.rate=N        writes per second over all disks (of this disk, if set for one); max = no
//   limit,
//                   idle = none. 0 means max.                                          default idle
//   w.size=A[-B]    bytes per write, random multiple of the unit between A and B      default unit
//   w.region=OFF,LEN  where to write                         default what `fill` covers, or the
//   disk w.mode=random|seq                                                               default
//   random w.zero=PCT      share of writes that are write-zeroes (with and without unmap in turn)
//   default 0 w.discard=PCT   share of writes that are discards default 0 w.fsync=N       flush
//   after every N writes, 0 = never                                   default 0 w.reads=N random
//   blocks per second read back and compared, per disk               default 50 w.depth=N writes in
//   flight per disk (fixed at start)                              default 4 w.fill=LEN |
//   OFF:LEN,OFF:LEN...   where the image holds records made by --fill w.unit=N  w.entropy=PCT must
//   be those given to --fill           default 4096, 100 w.disks=N       wait for so many disks
//   default 1 w.report=MS     time between reports, 0 = only on `status` default 1000 w.mem=BYTES
//   w.memrate=N           touch N pages per second of so much RAM, and check them too
//   w.net=ADDR/PREFIX                 bring up eth0 and echo TCP on port 7
//   w.seed=N
//
// On ttyS0 every line starting with "WITNESS " is JSON. Commands (ttyS1) are "ID COMMAND...": the
// answer carries "id":ID. Commands: status, verify (all that was written since boot), full-verify
// (the fill as well), stop, start, set [DISK] key=value..., reset (latencies and counts), fsync,
// poweroff.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum {
  kMaxDisks = 8,
  kMaxDepth = 64,
  kMaxExtents = 64,
  kMaxWrite = 4 << 20,
  kVerifyBytes = 1 << 20,
  kMaxMismatchLines = 20,
  kCatchUpNs = 100 * 1000 * 1000,  // a writer that is late makes up for at most so much
  kBuckets = 40 * 16,
};

static const uint64_t kMagic = 0x3153454e54495744;  // "DWITNES1" in memory

// Model values. A number in between is the sequence number of the record the unit holds.
static const uint32_t kUnknown = 0;             // nothing known: not compared
static const uint32_t kFilled = 1;              // initial content
static const uint32_t kFirstSeq = 2;            //
static const uint32_t kZero = 0x7fffffff;       // reads as zeroes
static const uint32_t kDiscarded = 0x80000000;  // flag: reads as before, or as zeroes

// ---------------------------------------------------------------------------------------- records

struct header {
  uint64_t magic, disk, unit, seq, check;
};

static uint32_t g_unit = 4096;
static unsigned g_entropy = 100;

static uint64_t mix(uint64_t x) {  // splitmix64's finaliser
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

static uint64_t disk_key(const char* name) {
  uint64_t key = 0;
  for (; *name; ++name) key = mix(key ^ (uint8_t)*name);
  return key;
}

static void make_unit(uint8_t* buf, uint64_t disk, uint64_t unit, uint32_t seq) {
  struct header h = {kMagic, disk, unit, seq, mix(mix(disk ^ unit) ^ seq)};
  memcpy(buf, &h, sizeof h);
  uint64_t* word = (uint64_t*)(buf + sizeof h);
  size_t words = (g_unit - sizeof h) / 8, noise = words * g_entropy / 100;
  uint64_t x = h.check;
  for (size_t i = 0; i < noise; ++i) {
    x = x * 6364136223846793005u + 1442695040888963407u;
    word[i] = x ^ (x >> 29);
  }
  memset(word + noise, 'w', (words - noise) * 8);
}

static bool all_zero(const uint8_t* buf, size_t n) {
  return buf[0] == 0 && memcmp(buf, buf + 1, n - 1) == 0;
}

static bool unit_is(const uint8_t* buf, uint64_t disk, uint64_t unit, uint32_t seq) {
  uint8_t want[65536];
  const struct header* h = (const struct header*)buf;
  if (h->magic != kMagic || h->seq != seq || h->unit != unit) return false;
  make_unit(want, disk, unit, seq);
  return memcmp(buf, want, g_unit) == 0;
}

// ------------------------------------------------------------------------------------- small tools

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void sleep_until(uint64_t ns) {
  struct timespec t = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
  clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

static uint64_t parse_size(const char* s, char** end) {
  char* e;
  uint64_t v = strtoull(s, &e, 10);
  switch (toupper(*e)) {
    case 'G': v <<= 10;  // fall through
    case 'M': v <<= 10;  // fall through
    case 'K': v <<= 10; ++e;
  }
  if (end) *end = e;
  return v;
}

struct extent {
  uint64_t offset, length;
};

static int parse_extents(const char* s, struct extent* out) {
  int n = 0;
  while (*s && n < kMaxExtents) {
    char* e;
    struct extent x = {0, parse_size(s, &e)};
    if (*e == ':') {
      x.offset = x.length;
      x.length = parse_size(e + 1, &e);
    }
    if (x.length) out[n++] = x;
    if (*e != ',') break;
    s = e + 1;
  }
  return n;
}

static void* aligned(size_t n) {
  void* p = NULL;
  if (posix_memalign(&p, 4096, n) != 0) abort();
  memset(p, 0, n);
  return p;
}

static uint64_t next_random(uint64_t* state) { return mix((*state)++); }

static pthread_mutex_t g_print = PTHREAD_MUTEX_INITIALIZER;

__attribute__((format(printf, 1, 2))) static void say(const char* format, ...) {
  static char line[16384];
  pthread_mutex_lock(&g_print);
  va_list ap;
  va_start(ap, format);
  int n = snprintf(line, sizeof line, "WITNESS ");
  n += vsnprintf(line + n, sizeof line - (size_t)n - 2, format, ap);
  va_end(ap);
  if (n > (int)sizeof line - 2) n = sizeof line - 2;
  line[n++] = '\n';
  for (int done = 0; done < n;) {  // one writer at a time, so that lines stay whole
    ssize_t w = write(1, line + done, (size_t)(n - done));
    if (w > 0)
      done += (int)w;
    else if (w < 0 && errno != EINTR)
      break;
  }
  pthread_mutex_unlock(&g_print);
}

// --------------------------------------------------------------------------------------- latencies
// 16 linear buckets per power of two: a percentile is right to about 6 %.

struct latency {
  uint64_t count, sum_us, max_us;
  uint32_t bucket[kBuckets];
};

static void latency_add(struct latency* l, uint64_t us) {
  unsigned b = (unsigned)us;
  if (us >= 16) {
    unsigned log = 63 - (unsigned)__builtin_clzll(us);
    b = (log - 3) * 16 + (unsigned)((us >> (log - 4)) & 15);
  }
  if (b >= kBuckets) b = kBuckets - 1;
  l->bucket[b]++;
  l->count++;
  l->sum_us += us;
  if (us > l->max_us) l->max_us = us;
}

static void latency_merge(struct latency* a, const struct latency* b) {
  a->count += b->count;
  a->sum_us += b->sum_us;
  if (b->max_us > a->max_us) a->max_us = b->max_us;
  for (int i = 0; i < kBuckets; ++i) a->bucket[i] += b->bucket[i];
}

static uint64_t latency_percentile(const struct latency* l, double p) {
  uint64_t rank = (uint64_t)((double)l->count * p), seen = 0;
  for (unsigned b = 0; b < kBuckets; ++b) {
    seen += l->bucket[b];
    if (seen > rank) {
      uint64_t upper = b < 16 ? b : ((uint64_t)(16 + b % 16 + 1) << (b / 16 + 3 - 4)) - 1;
      return upper < l->max_us ? upper : l->max_us;
    }
  }
  return l->max_us;
}

static int latency_print(char* out, size_t n, const char* name, const struct latency* l) {
  return snprintf(out, n,
                  "\"%s\":{\"count\":%" PRIu64 ",\"mean_us\":%.1f,\"p50_us\":%" PRIu64
                  ",\"p99_us\":%" PRIu64 ",\"max_us\":%" PRIu64 "}",
                  name, l->count, l->count ? (double)l->sum_us / (double)l->count : 0.0,
                  latency_percentile(l, 0.50), latency_percentile(l, 0.99), l->max_us);
}

// ------------------------------------------------------------------------------------------- disks

struct settings {
  double rate;  // per second; 0 = as fast as possible, < 0 = idle
  uint64_t size_min, size_max, region_offset, region_length;
  bool sequential;
  unsigned zero_pct, discard_pct, fsync_every;
  double reads;
};

struct pacer {
  uint64_t due;  // when the next one may go
};

struct counts {
  uint64_t writes, bytes, zeroes, discards, flushes, reads;
};

struct disk {
  char name[32];
  int fd;
  uint64_t key, units;
  int depth;

  pthread_mutex_t lock;    // guards everything below
  pthread_cond_t changed;  // a unit became free, or a setting changed
  struct settings set;
  uint32_t* model;  // per unit, see kUnknown...
  uint8_t* busy;    // per unit: an operation is under way
  uint32_t seq;
  uint64_t cursor;  // sequential mode: next unit
  uint64_t random;
  struct pacer write_pacer, read_pacer;
  struct counts now, total;  // since `reset`; since boot
  struct latency recent, since_reset;
  uint64_t mismatches, discard_changes, io_errors;  // never reset
  uint64_t since_flush;
};

static struct disk g_disk[kMaxDisks];
static int g_disks;
static bool g_stopped;  // by the `stop` command; read under each disk's lock
static uint64_t g_boot_ns, g_reset_ns, g_mismatch_lines;

static void count_mismatch(struct disk* d, uint64_t unit, uint32_t want, const uint8_t* found) {
  d->mismatches++;
  if (__atomic_fetch_add(&g_mismatch_lines, 1, __ATOMIC_RELAXED) >= kMaxMismatchLines) return;
  const struct header* h = (const struct header*)found;
  const char* kind = "garbage";
  uint64_t seq = 0;
  if (all_zero(found, g_unit))
    kind = "zeroes";
  else if (h->magic == kMagic) {
    seq = h->seq;
    if (h->disk != d->key)
      kind = "other disk";
    else if (h->unit != unit)
      kind = "other block";
    else if (!unit_is(found, d->key, unit, (uint32_t)h->seq))
      kind = "torn";
    else
      kind = "stale";
  }
  say("{\"type\":\"mismatch\",\"disk\":\"%s\",\"offset\":%" PRIu64 ",\"expected\":%" PRIu32
      ",\"found\":%" PRIu64 ",\"kind\":\"%s\"}",
      d->name, unit * g_unit, want == kZero ? 0 : want, seq, kind);
}

// Compares one unit with the model; called with the unit marked busy and the lock held.
static void judge(struct disk* d, uint64_t unit, const uint8_t* found) {
  uint32_t m = d->model[unit];
  if (m == kUnknown) return;
  if (m & kDiscarded) {
    // A discard leaves the content to the device; but what it once answered, it must go on
    // answering, wherever the guest runs. So the first read after a discard settles the model.
    uint32_t before = m & ~kDiscarded;
    if (all_zero(found, g_unit))
      d->model[unit] = kZero;
    else if (before == kUnknown || (before != kZero && unit_is(found, d->key, unit, before)))
      d->model[unit] = before;
    else {
      d->discard_changes++;
      count_mismatch(d, unit, before, found);
    }
    return;
  }
  bool good = m == kZero ? all_zero(found, g_unit) : unit_is(found, d->key, unit, m);
  if (!good) count_mismatch(d, unit, m, found);
}

static bool range_free(const struct disk* d, uint64_t unit, uint64_t n) {
  return memchr(d->busy + unit, 1, n) == NULL;
}

static void range_release(struct disk* d, uint64_t unit, uint64_t n) {  // lock held
  memset(d->busy + unit, 0, n);
  pthread_cond_broadcast(&d->changed);
}

// Waits for this operation's turn. Returns with the lock held.
static void wait_turn(struct disk* d, struct pacer* p, bool is_write) {
  pthread_mutex_lock(&d->lock);
  for (;;) {
    double rate = is_write ? d->set.rate : d->set.reads;
    bool idle = g_stopped || rate < 0 || (!is_write && rate == 0);
    if (idle) {
      pthread_cond_wait(&d->changed, &d->lock);
      continue;
    }
    if (rate == 0) return;
    uint64_t now = now_ns();
    if (p->due + kCatchUpNs < now) p->due = now - kCatchUpNs;
    uint64_t mine = p->due;
    p->due += (uint64_t)(1e9 / rate);
    if (mine <= now) return;
    if (mine > now + 1000000000u) {  // a very low rate: look at the settings again now and then
      p->due = mine;
      mine = now + 1000000000u;
      pthread_mutex_unlock(&d->lock);
      sleep_until(mine);
      pthread_mutex_lock(&d->lock);
      continue;
    }
    pthread_mutex_unlock(&d->lock);
    sleep_until(mine);
    pthread_mutex_lock(&d->lock);
    if (!g_stopped) return;
  }
}

enum op { kWrite, kZeroKeep, kZeroUnmap, kDiscard };

static uint64_t size_in_units(const struct settings* s, uint64_t* random) {
  uint64_t a = s->size_min / g_unit, b = s->size_max / g_unit;
  return a + (b > a ? next_random(random) % (b - a + 1) : 0);
}

static void* writer(void* arg) {
  struct disk* d = arg;
  uint8_t* buf = aligned(kMaxWrite);
  for (;;) {
    wait_turn(d, &d->write_pacer, true);
    const struct settings* s = &d->set;
    uint64_t n = 0, at = 0;
    for (int tries = 0; !g_stopped; ++tries) {
      uint64_t first = s->region_offset / g_unit, span = s->region_length / g_unit;
      n = size_in_units(s, &d->random);
      if (n > span) n = span;
      if (s->sequential) {
        if (d->cursor < first || d->cursor + n > first + span) d->cursor = first;
        at = d->cursor;
      } else {
        at = first + next_random(&d->random) % (span - n + 1);
      }
      if (range_free(d, at, n)) break;
      if (s->sequential || tries % 16 == 15) pthread_cond_wait(&d->changed, &d->lock);
    }
    if (g_stopped) {
      pthread_mutex_unlock(&d->lock);
      continue;
    }
    if (s->sequential) d->cursor = at + n;
    memset(d->busy + at, 1, n);
    uint32_t seq = d->seq++;
    unsigned dice = (unsigned)(next_random(&d->random) % 100);
    enum op op = kWrite;
    if (dice < s->zero_pct)
      op = seq % 2 ? kZeroKeep : kZeroUnmap;
    else if (dice < s->zero_pct + s->discard_pct)
      op = kDiscard;
    pthread_mutex_unlock(&d->lock);

    uint64_t offset = at * g_unit, bytes = n * g_unit;
    if (op == kWrite)
      for (uint64_t i = 0; i < n; ++i) make_unit(buf + i * g_unit, d->key, at + i, seq);
    uint64_t begin = now_ns();
    bool ok = false, done = true;
    uint64_t range[2] = {offset, bytes};
    if (op == kDiscard) {
      ok = ioctl(d->fd, BLKDISCARD, range) == 0;
      if (!ok && (errno == EOPNOTSUPP || errno == ENOTTY)) ok = true, done = false;
    } else if (op == kZeroUnmap || op == kZeroKeep) {
      int mode = op == kZeroUnmap ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;
      ok = fallocate(d->fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes) == 0;
      if (!ok && errno == EOPNOTSUPP) ok = ioctl(d->fd, BLKZEROOUT, range) == 0;
    } else {
      ok = pwrite(d->fd, buf, bytes, (off_t)offset) == (ssize_t)bytes;
    }
    uint64_t us = (now_ns() - begin) / 1000;

    pthread_mutex_lock(&d->lock);
    for (uint64_t i = at; i < at + n; ++i) {
      if (!ok)
        d->model[i] = kUnknown;
      else if (op == kWrite)
        d->model[i] = seq;
      else if (op != kDiscard)
        d->model[i] = kZero;
      else if (done && d->model[i] != kZero)
        d->model[i] |= kDiscarded;
    }
    range_release(d, at, n);
    if (!ok)
      d->io_errors++;
    else if (op == kWrite) {
      d->now.writes++;
      d->now.bytes += bytes;
      latency_add(&d->recent, us);
      latency_add(&d->since_reset, us);
    } else if (op == kDiscard)
      d->now.discards++;
    else
      d->now.zeroes++;
    bool flush = d->set.fsync_every && ++d->since_flush >= d->set.fsync_every;
    if (flush) d->since_flush = 0;
    pthread_mutex_unlock(&d->lock);
    if (flush) {
      ok = fsync(d->fd) == 0;
      pthread_mutex_lock(&d->lock);
      if (ok)
        d->now.flushes++;
      else
        d->io_errors++;
      pthread_mutex_unlock(&d->lock);
    }
  }
  return NULL;
}

static void* reader(void* arg) {
  struct disk* d = arg;
  uint8_t* buf = aligned(g_unit);
  uint64_t random = d->random ^ 0x5ead;
  for (;;) {
    wait_turn(d, &d->read_pacer, false);
    uint64_t unit = 0;
    bool found = false;
    for (int tries = 0; tries < 1000 && !found; ++tries) {
      // Half of the reads where it writes, half anywhere.
      if (tries % 2 == 0)
        unit = (d->set.region_offset + next_random(&random) % d->set.region_length) / g_unit;
      else
        unit = next_random(&random) % d->units;
      found = d->model[unit] != kUnknown && !d->busy[unit];
    }
    if (!found) {
      pthread_mutex_unlock(&d->lock);
      sleep_until(now_ns() + 10000000);
      continue;
    }
    d->busy[unit] = 1;
    pthread_mutex_unlock(&d->lock);
    bool ok = pread(d->fd, buf, g_unit, (off_t)(unit * g_unit)) == (ssize_t)g_unit;
    pthread_mutex_lock(&d->lock);
    if (ok) {
      judge(d, unit, buf);
      d->now.reads++;
    } else {
      d->io_errors++;
    }
    range_release(d, unit, 1);
    pthread_mutex_unlock(&d->lock);
  }
  return NULL;
}

// Reads back every known unit. `all`: the initial content too. Writers go on meanwhile.
static uint64_t verify_disk(struct disk* d, bool all) {
  uint8_t* buf = aligned(kVerifyBytes);
  uint64_t chunk = kVerifyBytes / g_unit, checked = 0;
  for (uint64_t at = 0; at < d->units;) {
    pthread_mutex_lock(&d->lock);
    uint64_t n = 0;
    while (at < d->units && (d->model[at] == kUnknown || (!all && d->model[at] == kFilled))) ++at;
    // Units are taken one by one, in order: a writer takes all of its units at once or none, so
    // the two never wait for each other in a circle, and a busy region cannot starve this.
    while (n < chunk && at + n < d->units) {
      uint32_t m = d->model[at + n];
      if (m == kUnknown || (!all && m == kFilled)) break;
      while (d->busy[at + n]) pthread_cond_wait(&d->changed, &d->lock);
      d->busy[at + n++] = 1;
    }
    pthread_mutex_unlock(&d->lock);
    if (n == 0) continue;
    bool ok = pread(d->fd, buf, n * g_unit, (off_t)(at * g_unit)) == (ssize_t)(n * g_unit);
    // The comparison is long and needs no lock: the units are ours.
    uint8_t* bad = calloc(n, 1);
    for (uint64_t i = 0; ok && i < n; ++i) {
      uint32_t m = d->model[at + i];
      bad[i] = m < kZero && m != kUnknown ? !unit_is(buf + i * g_unit, d->key, at + i, m) : 1;
    }
    pthread_mutex_lock(&d->lock);
    if (!ok) d->io_errors++;
    for (uint64_t i = 0; ok && i < n; ++i)
      if (bad[i]) judge(d, at + i, buf + i * g_unit);
    range_release(d, at, n);
    pthread_mutex_unlock(&d->lock);
    free(bad);
    at += n;
    checked += n;
  }
  free(buf);
  return checked;
}

// ---------------------------------------------------------------------------------- memory,
// network

static struct {
  uint64_t pages, random;
  double rate;
  uint64_t* page;     // pages * 512 words
  uint32_t* version;  // what each page must hold
  pthread_mutex_t lock;
  uint64_t touched, mismatches;
} g_mem = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void mem_set(uint64_t i) {
  uint64_t* p = g_mem.page + i * 512;
  uint64_t v = ++g_mem.version[i];
  for (int k = 0; k < 512; k += 64) p[k] = mix(mix(i) ^ v ^ (unsigned)k);
}

static uint64_t mem_verify(void) {
  uint64_t bad = 0;
  pthread_mutex_lock(&g_mem.lock);
  for (uint64_t i = 0; i < g_mem.pages; ++i) {
    const uint64_t* p = g_mem.page + i * 512;
    for (int k = 0; k < 512; k += 64)
      if (p[k] != mix(mix(i) ^ g_mem.version[i] ^ (unsigned)k)) {
        ++bad;
        break;
      }
  }
  g_mem.mismatches += bad;
  pthread_mutex_unlock(&g_mem.lock);
  return bad;
}

static void* mem_toucher(void* arg) {
  (void)arg;
  uint64_t due = now_ns();
  for (;;) {
    pthread_mutex_lock(&g_mem.lock);
    double rate = g_mem.rate;
    unsigned batch = rate > 0 && rate < 1000 ? 1 : 16;
    if (rate >= 0)
      for (unsigned i = 0; i < batch; ++i) {
        mem_set(next_random(&g_mem.random) % g_mem.pages);
        g_mem.touched++;
      }
    pthread_mutex_unlock(&g_mem.lock);
    if (rate == 0) continue;
    uint64_t now = now_ns();
    if (due + kCatchUpNs < now) due = now - kCatchUpNs;
    due += rate < 0 ? 100000000 : (uint64_t)(1e9 * batch / rate);
    if (due > now) sleep_until(due);
  }
  return NULL;
}

static void* echo(void* arg) {
  int fd = (int)(intptr_t)arg;
  char buf[4096];
  ssize_t n;
  while ((n = read(fd, buf, sizeof buf)) > 0)
    if (write(fd, buf, (size_t)n) != n) break;
  close(fd);
  return NULL;
}

static void* echo_server(void* arg) {
  int fd = (int)(intptr_t)arg;
  for (;;) {
    int client = accept(fd, NULL, NULL);
    pthread_t t;
    if (client >= 0 && pthread_create(&t, NULL, echo, (void*)(intptr_t)client) == 0)
      pthread_detach(t);
  }
  return NULL;
}

static void net_up(const char* spec) {
  char addr[64];
  snprintf(addr, sizeof addr, "%.63s", spec);
  char* slash = strchr(addr, '/');
  int prefix = slash ? atoi(slash + 1) : 24;
  if (slash) *slash = 0;
  int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
  struct ifreq r = {0};
  struct sockaddr_in* in = (struct sockaddr_in*)&r.ifr_addr;
  strcpy(r.ifr_name, "lo");
  ioctl(fd, SIOCGIFFLAGS, &r);
  r.ifr_flags |= IFF_UP;
  ioctl(fd, SIOCSIFFLAGS, &r);
  strcpy(r.ifr_name, "eth0");
  memset(&r.ifr_addr, 0, sizeof r.ifr_addr);
  in->sin_family = AF_INET;
  inet_pton(AF_INET, addr, &in->sin_addr);
  bool ok = ioctl(fd, SIOCSIFADDR, &r) == 0;
  in->sin_addr.s_addr = htonl(prefix ? ~0u << (32 - prefix) : 0);
  ok = ok && ioctl(fd, SIOCSIFNETMASK, &r) == 0 && ioctl(fd, SIOCGIFFLAGS, &r) == 0;
  r.ifr_flags |= IFF_UP | IFF_RUNNING;
  ok = ok && ioctl(fd, SIOCSIFFLAGS, &r) == 0;
  struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(7)};
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  ok = ok && bind(fd, (struct sockaddr*)&any, sizeof any) == 0 && listen(fd, 16) == 0;
  pthread_t t;
  if (ok) ok = pthread_create(&t, NULL, echo_server, (void*)(intptr_t)fd) == 0;
  if (!ok) say("{\"type\":\"error\",\"text\":\"network %s: %s\"}", spec, strerror(errno));
}

// ---------------------------------------------------------------------------------------- settings

// Returns NULL, or what is wrong. Lock held. `share`: among how many disks a rate is divided.
static const char* apply(struct disk* d, const char* key, const char* value, int share) {
  struct settings s = d->set;
  char* e;
  if (!strcmp(key, "rate")) {
    s.rate = !strcmp(value, "max") ? 0 : !strcmp(value, "idle") ? -1 : atof(value) / share;
  } else if (!strcmp(key, "size")) {
    s.size_min = s.size_max = parse_size(value, &e);
    if (*e == '-') s.size_max = parse_size(e + 1, &e);
    if (s.size_min < g_unit || s.size_min % g_unit || s.size_max % g_unit ||
        s.size_max < s.size_min || s.size_max > kMaxWrite)
      return "bad size";
  } else if (!strcmp(key, "region")) {
    s.region_offset = parse_size(value, &e) / g_unit * g_unit;
    if (*e != ',' && *e != ':') return "bad region";
    s.region_length = parse_size(e + 1, &e) / g_unit * g_unit;
    if (s.region_length == 0 || s.region_offset + s.region_length > d->units * g_unit)
      return "bad region";
    d->cursor = s.region_offset / g_unit;
  } else if (!strcmp(key, "mode")) {
    s.sequential = !strcmp(value, "seq");
    if (!s.sequential && strcmp(value, "random")) return "bad mode";
  } else if (!strcmp(key, "zero"))
    s.zero_pct = (unsigned)atoi(value);
  else if (!strcmp(key, "discard"))
    s.discard_pct = (unsigned)atoi(value);
  else if (!strcmp(key, "fsync"))
    s.fsync_every = (unsigned)atoi(value);
  else if (!strcmp(key, "reads"))
    s.reads = atof(value);
  else
    return "unknown key";
  d->set = s;
  pthread_cond_broadcast(&d->changed);
  return NULL;
}

static char g_cmdline[4096];

// The value of w.NAME.KEY, else of w.KEY, else NULL. `own` tells which it was.
static const char* option(const char* name, const char* key, char* out, size_t n, bool* own) {
  for (int level = 0; level < 2; ++level) {
    char want[64];
    if (level == 0 && !name) continue;
    if (level == 0)
      snprintf(want, sizeof want, " w.%s.%s=", name, key);
    else
      snprintf(want, sizeof want, " w.%s=", key);
    const char* at = strstr(g_cmdline, want);
    if (!at) continue;
    at += strlen(want);
    size_t len = strcspn(at, " \n");
    snprintf(out, n, "%.*s", (int)len, at);
    if (own) *own = level == 0;
    return out;
  }
  return NULL;
}

static uint64_t option_number(const char* key, uint64_t fallback) {
  char v[64];
  return option(NULL, key, v, sizeof v, NULL) ? parse_size(v, NULL) : fallback;
}

// ----------------------------------------------------------------------------------------- reports

static int counts_print(char* out, size_t n, const struct counts* c) {
  return snprintf(out, n,
                  "\"writes\":%" PRIu64 ",\"bytes\":%" PRIu64 ",\"zeroes\":%" PRIu64
                  ",\"discards\":%" PRIu64 ",\"flushes\":%" PRIu64 ",\"reads\":%" PRIu64,
                  c->writes, c->bytes, c->zeroes, c->discards, c->flushes, c->reads);
}

static void report(const char* type, long id) {
  static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;
  static struct latency recent, since_reset;
  static char disks[8192], lat[1024], text[512];
  static uint64_t number, last_ns, last_writes;
  pthread_mutex_lock(&one);
  memset(&recent, 0, sizeof recent);
  memset(&since_reset, 0, sizeof since_reset);
  struct counts sum = {0};
  uint64_t mismatches = 0, discard_changes = 0, io_errors = 0;
  int at = 0;
  for (int i = 0; i < g_disks; ++i) {
    struct disk* d = &g_disk[i];
    pthread_mutex_lock(&d->lock);
    latency_merge(&recent, &d->recent);
    latency_merge(&since_reset, &d->since_reset);
    memset(&d->recent, 0, sizeof d->recent);
    const struct counts* c = &d->now;
    sum.writes += c->writes, sum.bytes += c->bytes, sum.zeroes += c->zeroes;
    sum.discards += c->discards, sum.flushes += c->flushes, sum.reads += c->reads;
    mismatches += d->mismatches, discard_changes += d->discard_changes, io_errors += d->io_errors;
    counts_print(text, sizeof text, c);
    at += snprintf(disks + at, sizeof disks - (size_t)at,
                   "%s\"%s\":{%s,\"mismatches\":%" PRIu64 ",\"io_errors\":%" PRIu64
                   ",\"max_us\":%" PRIu64 "}",
                   i ? "," : "", d->name, text, d->mismatches, d->io_errors, d->since_reset.max_us);
    pthread_mutex_unlock(&d->lock);
  }
  uint64_t now = now_ns();
  if (sum.writes < last_writes) last_writes = 0;  // reset
  double rate = last_ns ? (double)(sum.writes - last_writes) * 1e9 / (double)(now - last_ns) : 0;
  last_ns = now, last_writes = sum.writes;
  int l = latency_print(lat, sizeof lat, "recent", &recent);
  lat[l++] = ',';
  latency_print(lat + l, sizeof lat - (size_t)l, "since_reset", &since_reset);
  counts_print(text, sizeof text, &sum);
  pthread_mutex_lock(&g_mem.lock);
  uint64_t touched = g_mem.touched, mem_bad = g_mem.mismatches;
  pthread_mutex_unlock(&g_mem.lock);
  say("{\"type\":\"%s\",\"id\":%ld,\"n\":%" PRIu64 ",\"uptime_ms\":%" PRIu64
      ",\"since_reset_ms\":%" PRIu64 ",\"stopped\":%s,\"rate\":%.1f,%s,\"mismatches\":%" PRIu64
      ",\"discard_changes\":%" PRIu64 ",\"io_errors\":%" PRIu64 ",\"pages_touched\":%" PRIu64
      ",\"page_mismatches\":%" PRIu64 ",\"latency\":{%s},\"disks\":{%s}}",
      type, id, ++number, (now - g_boot_ns) / 1000000, (now - g_reset_ns) / 1000000,
      g_stopped ? "true" : "false", rate, text, mismatches, discard_changes, io_errors, touched,
      mem_bad, lat, disks);
  pthread_mutex_unlock(&one);
}

// ---------------------------------------------------------------------------------------- commands

struct command {
  long id;
  char text[512];
};

static void* verify_thread(void* arg) {
  struct command* c = arg;
  static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;
  bool all = !strcmp(c->text, "full-verify");
  pthread_mutex_lock(&one);
  uint64_t begin = now_ns(), units = 0, mismatches = 0, errors = 0;
  for (int i = 0; i < g_disks; ++i) {
    struct disk* d = &g_disk[i];
    units += verify_disk(d, all);
    pthread_mutex_lock(&d->lock);
    mismatches += d->mismatches;
    errors += d->io_errors;
    pthread_mutex_unlock(&d->lock);
  }
  uint64_t pages = g_mem.pages ? mem_verify() : 0;
  // The verdict is about the guest's whole life: a mismatch seen earlier is not forgiven because
  // the block has been written again since.
  say("{\"type\":\"verdict\",\"id\":%ld,\"scope\":\"%s\",\"ok\":%s,\"units\":%" PRIu64
      ",\"bytes\":%" PRIu64 ",\"mismatches\":%" PRIu64 ",\"io_errors\":%" PRIu64
      ",\"page_mismatches\":%" PRIu64 ",\"ms\":%" PRIu64 "}",
      c->id, all ? "all" : "written", mismatches + errors + pages == 0 ? "true" : "false", units,
      units * g_unit, mismatches, errors, pages, (now_ns() - begin) / 1000000);
  pthread_mutex_unlock(&one);
  free(c);
  return NULL;
}

static void answer(long id, const char* error) {
  if (error)
    say("{\"type\":\"error\",\"id\":%ld,\"text\":\"%s\"}", id, error);
  else
    say("{\"type\":\"done\",\"id\":%ld}", id);
}

static void all_disks_wait_idle(void) {
  for (int i = 0; i < g_disks; ++i) {
    struct disk* d = &g_disk[i];
    pthread_mutex_lock(&d->lock);
    pthread_cond_broadcast(&d->changed);
    while (!range_free(d, 0, d->units)) pthread_cond_wait(&d->changed, &d->lock);
    pthread_mutex_unlock(&d->lock);
  }
}

static void run_command(char* line) {
  char *save = NULL, *word = strtok_r(line, " \r\n", &save);
  if (!word) return;
  long id = strtol(word, NULL, 10);
  char* name = strtok_r(NULL, " \r\n", &save);
  if (!name) return answer(id, "no command");
  if (!strcmp(name, "status")) return report("status", id);
  if (!strcmp(name, "verify") || !strcmp(name, "full-verify")) {
    struct command* c = calloc(1, sizeof *c);
    c->id = id;
    snprintf(c->text, sizeof c->text, "%s", name);
    pthread_t t;
    if (pthread_create(&t, NULL, verify_thread, c) == 0) pthread_detach(t);
    return;
  }
  if (!strcmp(name, "stop") || !strcmp(name, "start")) {
    for (int i = 0; i < g_disks; ++i) pthread_mutex_lock(&g_disk[i].lock);
    g_stopped = !strcmp(name, "stop");
    for (int i = 0; i < g_disks; ++i) {
      pthread_cond_broadcast(&g_disk[i].changed);
      pthread_mutex_unlock(&g_disk[i].lock);
    }
    if (g_stopped) all_disks_wait_idle();
    return answer(id, NULL);
  }
  if (!strcmp(name, "reset")) {
    for (int i = 0; i < g_disks; ++i) {
      struct disk* d = &g_disk[i];
      pthread_mutex_lock(&d->lock);
      memset(&d->now, 0, sizeof d->now);
      memset(&d->recent, 0, sizeof d->recent);
      memset(&d->since_reset, 0, sizeof d->since_reset);
      pthread_mutex_unlock(&d->lock);
    }
    g_reset_ns = now_ns();
    return answer(id, NULL);
  }
  if (!strcmp(name, "fsync")) {
    const char* error = NULL;
    for (int i = 0; i < g_disks; ++i)
      if (fsync(g_disk[i].fd) != 0) error = strerror(errno);
    return answer(id, error);
  }
  if (!strcmp(name, "set")) {
    struct disk* only = NULL;
    const char* error = NULL;
    for (char* pair; (pair = strtok_r(NULL, " \r\n", &save)) && !error;) {
      char* eq = strchr(pair, '=');
      if (!eq) {
        only = NULL;
        for (int i = 0; i < g_disks; ++i)
          if (!strcmp(g_disk[i].name, pair)) only = &g_disk[i];
        if (!only) error = "no such disk";
        continue;
      }
      *eq++ = 0;
      if (!strcmp(pair, "memrate")) {
        pthread_mutex_lock(&g_mem.lock);
        g_mem.rate = !strcmp(eq, "max") ? 0 : !strcmp(eq, "idle") ? -1 : atof(eq);
        pthread_mutex_unlock(&g_mem.lock);
        continue;
      }
      for (int i = 0; i < g_disks && !error; ++i) {
        if (only && only != &g_disk[i]) continue;
        pthread_mutex_lock(&g_disk[i].lock);
        error = apply(&g_disk[i], pair, eq, only ? 1 : g_disks);
        pthread_mutex_unlock(&g_disk[i].lock);
      }
    }
    return answer(id, error);
  }
  if (!strcmp(name, "poweroff")) {
    answer(id, NULL);
    for (int i = 0; i < g_disks; ++i) fsync(g_disk[i].fd);
    tcdrain(1);
    reboot(RB_POWER_OFF);
  }
  answer(id, "unknown command");
}

// ------------------------------------------------------------------------------------------- guest

static void die(const char* what) {
  say("{\"type\":\"fatal\",\"text\":\"%s: %s\"}", what, strerror(errno));
  tcdrain(1);
  reboot(RB_POWER_OFF);
  for (;;) pause();
}

static void load_modules(void) {
  FILE* f = fopen("/modules/order", "r");
  char name[256];
  while (f && fscanf(f, "%255s", name) == 1) {
    char path[300];
    snprintf(path, sizeof path, "/modules/%s", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) die(path);
    if (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST) die(path);
    close(fd);
  }
  if (f) fclose(f);
}

static int by_name(const void* a, const void* b) {
  return strcmp(((const struct disk*)a)->name, ((const struct disk*)b)->name);
}

static int find_disks(void) {
  int n = 0;
  DIR* dir = opendir("/sys/block");
  if (!dir) die("/sys/block");
  for (struct dirent* e; (e = readdir(dir)) && n < kMaxDisks;)
    if (!strncmp(e->d_name, "vd", 2) || !strncmp(e->d_name, "sd", 2))
      snprintf(g_disk[n++].name, sizeof g_disk[0].name, "%.31s", e->d_name);
  closedir(dir);
  qsort(g_disk, (size_t)n, sizeof g_disk[0], by_name);
  return n;
}

static void open_disk(struct disk* d) {
  static const char* const keys[] = {"size",    "region", "mode",  "zero",
                                     "discard", "fsync",  "reads", "rate"};
  char path[64], v[512];
  bool own;
  snprintf(path, sizeof path, "/dev/%.31s", d->name);
  d->fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
  uint64_t bytes;
  if (d->fd < 0 || ioctl(d->fd, BLKGETSIZE64, &bytes) != 0) die(path);
  d->key = disk_key(d->name);
  d->units = bytes / g_unit;
  d->seq = kFirstSeq;
  d->random = mix(d->key ^ option_number("seed", 1));
  d->depth = option(d->name, "depth", v, sizeof v, NULL) ? atoi(v) : 4;
  if (d->depth < 1 || d->depth > kMaxDepth) d->depth = 4;
  d->model = calloc(d->units, sizeof *d->model);
  d->busy = calloc(d->units, 1);
  if (!d->model || !d->busy) die("memory for the model");
  pthread_mutex_init(&d->lock, NULL);
  pthread_cond_init(&d->changed, NULL);

  struct extent fill[kMaxExtents];
  int fills = option(d->name, "fill", v, sizeof v, NULL) ? parse_extents(v, fill) : 0;
  uint64_t end = 0;
  for (int i = 0; i < fills; ++i) {
    for (uint64_t u = fill[i].offset / g_unit;
         u < (fill[i].offset + fill[i].length) / g_unit && u < d->units; ++u)
      d->model[u] = kFilled;
    if (fill[i].offset + fill[i].length > end) end = fill[i].offset + fill[i].length;
  }
  if (end == 0 || end > bytes) end = d->units * g_unit;
  d->set = (struct settings){
      .rate = -1, .size_min = g_unit, .size_max = g_unit, .region_length = end, .reads = 50};
  for (size_t i = 0; i < sizeof keys / sizeof *keys; ++i) {
    const char* error = NULL;
    if (option(d->name, keys[i], v, sizeof v, &own))
      error = apply(d, keys[i], v, own ? 1 : g_disks);
    if (error) say("{\"type\":\"error\",\"text\":\"%s: %s=%s: %s\"}", d->name, keys[i], v, error);
  }
}

static int open_tty(const char* path) {
  int fd = open(path, O_RDWR | O_NOCTTY);
  struct termios t;
  if (tcgetattr(fd, &t) == 0) {
    cfmakeraw(&t);  // no echo, above all
    t.c_oflag |= OPOST | ONLCR;
    tcsetattr(fd, TCSANOW, &t);
  }
  return fd;
}

static int guest(void) {
  char v[512];
  mount("devtmpfs", "/dev", "devtmpfs", 0, "");
  mount("proc", "/proc", "proc", 0, "");
  mount("sysfs", "/sys", "sysfs", 0, "");
  dup2(open_tty("/dev/ttyS1"), 0);
  dup2(open_tty("/dev/ttyS0"), 1);
  dup2(1, 2);
  g_cmdline[0] = ' ';
  int f = open("/proc/cmdline", O_RDONLY);
  if (f < 0 || read(f, g_cmdline + 1, sizeof g_cmdline - 2) < 0) die("/proc/cmdline");
  close(f);
  load_modules();

  g_unit = (uint32_t)option_number("unit", 4096);
  g_entropy = (unsigned)option_number("entropy", 100);
  if (g_unit < 512 || g_unit > 65536 || g_unit % 512 || g_entropy > 100) die("bad unit or entropy");
  int want = (int)option_number("disks", 1);
  uint64_t limit = now_ns() + 30ull * 1000000000u;
  while ((g_disks = find_disks()) < want && now_ns() < limit) sleep_until(now_ns() + 10000000);
  if (g_disks < want) die("not all disks appeared");
  g_boot_ns = g_reset_ns = now_ns();
  for (int i = 0; i < g_disks; ++i) open_disk(&g_disk[i]);

  pthread_t thread;
  pthread_attr_t small;
  pthread_attr_init(&small);
  pthread_attr_setstacksize(&small, 512 * 1024);
  g_mem.pages = option_number("mem", 0) / 4096;
  if (g_mem.pages) {
    g_mem.rate = option(NULL, "memrate", v, sizeof v, NULL) ? (!strcmp(v, "max")    ? 0
                                                               : !strcmp(v, "idle") ? -1
                                                                                    : atof(v))
                                                            : -1;
    g_mem.page = aligned(g_mem.pages * 4096);
    g_mem.version = calloc(g_mem.pages, sizeof *g_mem.version);
    for (uint64_t i = 0; i < g_mem.pages; ++i) mem_set(i);
    if (pthread_create(&thread, &small, mem_toucher, NULL) != 0) die("thread");
  }
  if (option(NULL, "net", v, sizeof v, NULL)) net_up(v);
  for (int i = 0; i < g_disks; ++i) {
    for (int k = 0; k < g_disk[i].depth; ++k)
      if (pthread_create(&thread, &small, writer, &g_disk[i]) != 0) die("thread");
    if (pthread_create(&thread, &small, reader, &g_disk[i]) != 0) die("thread");
  }
  say("{\"type\":\"ready\",\"disks\":%d}", g_disks);

  uint64_t interval = option_number("report", 1000) * 1000000u, due = now_ns() + interval;
  static char line[1024];
  size_t used = 0;
  for (;;) {
    uint64_t now = now_ns();
    if (interval && now >= due) {
      report("report", 0);
      due = now + interval;
    }
    struct pollfd p = {0, POLLIN, 0};
    int timeout = interval ? (int)((due - now) / 1000000 + 1) : -1;
    if (poll(&p, 1, timeout) <= 0) continue;
    ssize_t n = read(0, line + used, sizeof line - 1 - used);
    if (n <= 0) {
      sleep_until(now_ns() + 10000000);
      continue;
    }
    used += (size_t)n;
    line[used] = 0;
    for (char* end; (end = strpbrk(line, "\r\n")) != NULL;) {
      char one[1024];
      *end = 0;
      strcpy(one, line);
      used -= (size_t)(end + 1 - line);
      memmove(line, end + 1, used + 1);
      run_command(one);
    }
    if (used == sizeof line - 1) used = 0;  // no line is that long: noise
  }
  return 0;
}

// ----------------------------------------------------------------------------------- on the
// machine

// Common arguments of --fill and --check.
static int open_image(char** argv, int flags, uint64_t* key) {
  int fd = open(argv[2], flags | O_CLOEXEC);
  if (fd < 0) {
    fprintf(stderr, "witness: %s: %s\n", argv[2], strerror(errno));
    exit(1);
  }
  *key = disk_key(argv[3]);
  g_unit = (uint32_t)parse_size(argv[4], NULL);
  g_entropy = (unsigned)atoi(argv[5]);
  return fd;
}

static int fill_image(char** argv) {
  uint64_t key;
  int fd = open_image(argv, O_WRONLY, &key);
  struct extent x[kMaxExtents];
  int n = parse_extents(argv[6], x);
  uint8_t* buf = aligned(kVerifyBytes);
  for (int i = 0; i < n; ++i) {
    uint64_t at = x[i].offset / g_unit, end = (x[i].offset + x[i].length) / g_unit;
    while (at < end) {
      uint64_t count = kVerifyBytes / g_unit;
      if (count > end - at) count = end - at;
      for (uint64_t k = 0; k < count; ++k) make_unit(buf + k * g_unit, key, at + k, kFilled);
      if (pwrite(fd, buf, count * g_unit, (off_t)(at * g_unit)) != (ssize_t)(count * g_unit)) {
        perror("witness: write");
        return 1;
      }
      at += count;
    }
  }
  return close(fd) == 0 ? 0 : 1;
}

static int check_image(char** argv) {
  uint64_t key;
  int fd = open_image(argv, O_RDONLY, &key);
  uint8_t* buf = aligned(kVerifyBytes);
  uint64_t unit = 0, records = 0, filled = 0, zero = 0, other = 0, newest = 0;
  ssize_t got;
  while ((got = pread(fd, buf, kVerifyBytes / g_unit * g_unit, (off_t)(unit * g_unit))) >=
         (ssize_t)g_unit)
    for (ssize_t k = 0; k < got / (ssize_t)g_unit; ++k, ++unit) {
      const uint8_t* p = buf + k * g_unit;
      uint64_t seq = ((const struct header*)p)->seq;
      if (all_zero(p, g_unit))
        ++zero;
      else if (!unit_is(p, key, unit, (uint32_t)seq))
        ++other;
      else if (seq == kFilled)
        ++filled;
      else
        ++records, newest = seq > newest ? seq : newest;
    }
  printf("{\"units\":%" PRIu64 ",\"filled\":%" PRIu64 ",\"records\":%" PRIu64 ",\"zero\":%" PRIu64
         ",\"other\":%" PRIu64 ",\"newest\":%" PRIu64 "}\n",
         unit, filled, records, zero, other, newest);
  return got < 0 ? 1 : 0;
}

int main(int argc, char** argv) {
  if (getpid() == 1) return guest();
  if (argc == 7 && !strcmp(argv[1], "--fill")) return fill_image(argv);
  if (argc == 6 && !strcmp(argv[1], "--check")) return check_image(argv);
  fprintf(stderr,
          "usage: witness --fill IMAGE DISK UNIT ENTROPY OFFSET:LENGTH,...\n"
          "       witness --check IMAGE DISK UNIT ENTROPY\n"
          "Without arguments, as PID 1, it is the lab's guest.\n");
  return 2;
}
