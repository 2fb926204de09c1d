// SPDX-License-Identifier: Apache-2.0
//
// delay: a long cable between two network interfaces. Every frame that one of them receives is sent
// from the other one so many milliseconds later, in order, in both directions; the rate is not
// limited (tc's business). For the lab, whose kernel may have no netem. Linux's own segmentation
// offload is kept: a frame is up to 64 KiB with its virtio_net_hdr, so a Gbit/s is a few thousand
// frames.
//
//   delay IF1 IF2 MILLISECONDS       until SIGTERM; prints "ready" when it forwards
//
// A frame that finds the queue full (kMaxBytes: more than any rate here has in so short a time) or
// the interface's own queue full is lost, as on a wire.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
  kMaxFrame = sizeof(struct virtio_net_hdr) + ETH_HLEN + 4 + 65536,
  kMaxFrames = 1 << 16,
  kMaxBytes = 128 << 20,
  kSocketBuffer = 64 << 20,
};

struct frame {
  int64_t due;
  size_t size;
  char* bytes;  // virtio_net_hdr and the frame
};

// What came in at one end and is on its way to the other: a ring, oldest first.
struct cable {
  int in, out;
  struct frame frames[kMaxFrames];
  size_t first, count, bytes;
};

static struct cable cables[2];
static char incoming[kMaxFrame];

static void die(const char* what) {
  fprintf(stderr, "delay: %s: %s\n", what, strerror(errno));
  exit(1);
}

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static int open_interface(const char* name) {
  int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) die("socket");
  int one = 1, size = kSocketBuffer;
  if (setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &one, sizeof one) != 0) die("PACKET_VNET_HDR");
  if (setsockopt(fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, &one, sizeof one) != 0)
    die("PACKET_IGNORE_OUTGOING");
  if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size) != 0) die("SO_RCVBUFFORCE");
  // What waits in tc's queue counts here: a full one must lose frames, not hold up the others.
  if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size) != 0) die("SO_SNDBUFFORCE");
  struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL)};
  address.sll_ifindex = (int)if_nametoindex(name);
  if (address.sll_ifindex == 0) die(name);
  if (bind(fd, (struct sockaddr*)&address, sizeof address) != 0) die("bind");
  struct packet_mreq all = {.mr_ifindex = address.sll_ifindex, .mr_type = PACKET_MR_PROMISC};
  if (setsockopt(fd, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &all, sizeof all) != 0)
    die("promiscuous mode");
  return fd;
}

static void take_in(struct cable* cable, int64_t delay) {
  for (;;) {
    ssize_t size = recv(cable->in, incoming, sizeof incoming, MSG_TRUNC);
    if (size < 0) return;  // nothing more, or the interface is down for now
    if ((size_t)size > sizeof incoming || cable->count == kMaxFrames ||
        cable->bytes + (size_t)size > kMaxBytes) {
      continue;
    }
    struct frame* frame = &cable->frames[(cable->first + cable->count++) % kMaxFrames];
    frame->due = now() + delay;
    frame->size = (size_t)size;
    frame->bytes = malloc(frame->size);
    if (frame->bytes == NULL) die("memory");
    memcpy(frame->bytes, incoming, frame->size);
    cable->bytes += frame->size;
  }
}

static void let_out(struct cable* cable) {
  while (cable->count > 0 && cable->frames[cable->first].due <= now()) {
    struct frame* frame = &cable->frames[cable->first];
    // Errors: the queue is full or the interface is down. The frame is lost.
    (void)!send(cable->out, frame->bytes, frame->size, 0);
    cable->bytes -= frame->size;
    free(frame->bytes);
    cable->first = (cable->first + 1) % kMaxFrames;
    --cable->count;
  }
}

int main(int argc, char** argv) {
  if (argc != 4 || atoi(argv[3]) <= 0) {
    fprintf(stderr, "usage: delay IF1 IF2 MILLISECONDS\n");
    return 2;
  }
  const int64_t delay = atoi(argv[3]) * INT64_C(1000000);
  cables[0].in = cables[1].out = open_interface(argv[1]);
  cables[1].in = cables[0].out = open_interface(argv[2]);
  // A wire does not wait for its turn on a CPU. (Without the right to it: as good as it gets.)
  struct sched_param priority = {.sched_priority = 10};
  sched_setscheduler(0, SCHED_RR, &priority);
  puts("ready");
  fflush(stdout);
  for (;;) {
    int64_t next = INT64_MAX;
    for (int i = 0; i < 2; ++i) {
      if (cables[i].count > 0 && cables[i].frames[cables[i].first].due < next) {
        next = cables[i].frames[cables[i].first].due;
      }
    }
    struct pollfd ends[2] = {{.fd = cables[0].in, .events = POLLIN},
                             {.fd = cables[1].in, .events = POLLIN}};
    int64_t left = next - now();
    if (left < 0) left = 0;
    struct timespec wait = {.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};
    if (ppoll(ends, 2, next == INT64_MAX ? NULL : &wait, NULL) < 0 && errno != EINTR) die("poll");
    for (int i = 0; i < 2; ++i) {
      // A pulled cable is an error until somebody has read it.
      if ((ends[i].revents & POLLERR) != 0) {
        int error;
        socklen_t length = sizeof error;
        getsockopt(ends[i].fd, SOL_SOCKET, SO_ERROR, &error, &length);
      }
      take_in(&cables[i], delay);
      let_out(&cables[i]);
    }
  }
}
