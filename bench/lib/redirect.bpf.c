// SPDX-License-Identifier: GPL-2.0-only
/* The least that moves a frame from one interface to another: what the filter is measured against. */
#include <linux/bpf.h>

#include <bpf/bpf_helpers.h>

#ifndef TARGET_IFINDEX
#error "-DTARGET_IFINDEX=N"
#endif

SEC("tc")
int redirect(struct __sk_buff *skb)
{
	return bpf_redirect(TARGET_IFINDEX, 0);
}

char LICENSE[] SEC("license") = "GPL";
