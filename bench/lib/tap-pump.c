/*
 * Moves one frame again and again from tap to tap, as two guests would, and says how fast.
 *
 * tap-pump NETNS TAP [NETNS TAP]...: opens the taps, which exist, and answers lines of
 *   IN OUT WINDOW MS BYTES HEX    taps by their place in the arguments; frame as hex, padded with
 *                                 zeros to BYTES; at most WINDOW frames between the two
 * with one line of JSON. One thread writes and reads: where the kernel delivers within the write,
 * the thread's CPU time is the cost of the whole way, whatever else the machine does.
 *
 * A frame that has not come out after 20 ms is counted as lost and makes room in the window.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define TAPS 8
#define FRAME_BYTES 9216
#define BATCH 64
#define LOST_AFTER_MS 20

static int fail(const char *what)
{
	fprintf(stderr, "tap-pump: %s: %s\n", what, strerror(errno));
	return 1;
}

static int64_t now_ns(clockid_t clock)
{
	struct timespec time;

	clock_gettime(clock, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static int open_tap(const char *netns, const char *name)
{
	struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI};
	int ns = open(netns, O_RDONLY | O_CLOEXEC);
	int tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);

	if (ns < 0 || tap < 0 || setns(ns, CLONE_NEWNET) != 0)
		return -1;
	close(ns);
	/* The descriptor belongs to the namespace it was opened in. */
	close(tap);
	tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	return tap >= 0 && ioctl(tap, TUNSETIFF, &request) == 0 ? tap : -1;
}

static void drain(int tap)
{
	char frame[FRAME_BYTES];

	while (read(tap, frame, sizeof(frame)) > 0) {
	}
}

static int pump(int in, int out, long window, long ms, const uint8_t *frame, size_t bytes)
{
	uint8_t got[FRAME_BYTES], first[34] = {0};
	int64_t sent = 0, received = 0, lost = 0, refused = 0;
	int64_t wall, cpu, end;

	drain(out);
	wall = now_ns(CLOCK_MONOTONIC);
	cpu = now_ns(CLOCK_THREAD_CPUTIME_ID);
	end = wall + ms * 1000000;
	while (now_ns(CLOCK_MONOTONIC) < end) {
		int moved = 0;

		for (int i = 0; i < BATCH && sent - received - lost < window; i++) {
			if (write(in, frame, bytes) != (ssize_t)bytes) {
				if (errno != EAGAIN && errno != ENOBUFS)
					return fail("write");
				refused++;
				break;
			}
			sent++;
		}
		for (int i = 0; i < BATCH; i++) {
			ssize_t length = read(out, got, sizeof(got));

			if (length < 0 && errno != EAGAIN)
				return fail("read");
			if (length < 0)
				break;
			/* Others may speak too: IGMP of a bridge, say. */
			if ((size_t)length != bytes)
				continue;
			if (received == 0)
				memcpy(first, got, sizeof(first));
			received++;
			moved++;
		}
		if (moved == 0) {
			struct pollfd wait = {.fd = out, .events = POLLIN};

			if (poll(&wait, 1, LOST_AFTER_MS) == 0)
				lost = sent - received;
		}
	}
	cpu = now_ns(CLOCK_THREAD_CPUTIME_ID) - cpu;
	wall = now_ns(CLOCK_MONOTONIC) - wall;
	printf("{\"sent\":%lld,\"received\":%lld,\"refused\":%lld,\"wall_ns\":%lld,\"cpu_ns\":%lld,\"first\":\"",
	       (long long)sent, (long long)received, (long long)refused, (long long)wall,
	       (long long)cpu);
	for (size_t i = 0; i < sizeof(first); i++)
		printf("%02x", first[i]);
	printf("\"}\n");
	fflush(stdout);
	return 0;
}

int main(int count, char **words)
{
	static char line[64 + 2 * FRAME_BYTES];
	int taps[TAPS];
	int known = (count - 1) / 2;

	if (known < 2 || known > TAPS || count % 2 == 0) {
		fprintf(stderr, "usage: tap-pump NETNS TAP NETNS TAP...\n");
		return 2;
	}
	for (int i = 0; i < known; i++) {
		taps[i] = open_tap(words[1 + 2 * i], words[2 + 2 * i]);
		if (taps[i] < 0)
			return fail(words[2 + 2 * i]);
	}
	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin) != NULL) {
		uint8_t frame[FRAME_BYTES] = {0};
		int in, out, at = 0;
		long window, ms;
		size_t bytes, given = 0;

		if (sscanf(line, "%d %d %ld %ld %zu %n", &in, &out, &window, &ms, &bytes, &at) != 5 ||
		    in < 0 || in >= known || out < 0 || out >= known || bytes > FRAME_BYTES)
			return fail("bad line");
		for (const char *hex = line + at; given < bytes; hex += 2) {
			unsigned value;

			if (sscanf(hex, "%2x", &value) != 1)
				break;
			frame[given++] = value;
		}
		if (pump(taps[in], taps[out], window, ms, frame, bytes) != 0)
			return 1;
	}
	return 0;
}
