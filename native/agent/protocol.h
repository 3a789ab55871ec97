// The handshake between the agent in QEMU and the data plane. C, shared by both sides.
//
// One SOCK_SEQPACKET connection per VM, on one machine, so fields are in host byte order; every
// message is one packet of exactly its structure's size, and anything else ends the connection.
//
//   agent  -> server  memtap_hello
//   server -> agent   memtap_offer    refused (code != ""), or with descriptors in SCM_RIGHTS:
//                                     first attachment: /dev/userfaultfd [, the replica, read-only]
//                                     resumed: none
//   agent  -> server  memtap_attach   with one descriptor in SCM_RIGHTS: the userfaultfd
//   server -> agent   memtap_ack      faults are served from here on; the connection stays open,
//                                     and its end tells the agent that the data plane is gone
#pragma once

#include <stdint.h>

#define MEMTAP_MAGIC 0x50415453u  // "STAP"
#define MEMTAP_VERSION 1u

#define MEMTAP_MEMFD_LINK "/memfd:memory-backend-memfd"

// memtap_hello.flags
#define MEMTAP_RESUME 1u  // the memory exists already; the data plane was restarted
#define MEMTAP_CLONE 2u   // (with MEMTAP_RESUME) the memory is a private mapping of a replica

struct memtap_hello {
  uint32_t magic;
  uint32_t version;
  uint32_t flags;
  uint32_t reserved;
  uint64_t ram_bytes;
  uint64_t replica_dev;  // of the replica mapped, when resuming a clone; otherwise 0
  uint64_t replica_ino;
  char vm[64];      // NUL-terminated
  char token[136];  // NUL-terminated
};

struct memtap_offer {
  uint32_t magic;
  uint32_t version;
  uint32_t clone;  // 1: a replica descriptor follows /dev/userfaultfd
  uint32_t reserved;
  uint64_t nonce;          // to be sent back: shows that the peer lives after it was looked at
  uint64_t features;       // for UFFDIO_API
  uint64_t register_mode;  // for UFFDIO_REGISTER
  char code[24];           // an error code of the product's table, or "" when accepted
  char message[168];
};

struct memtap_attach {
  uint32_t magic;
  uint32_t version;
  uint64_t nonce;  // of the offer
  uint64_t base;   // address of the guest's RAM in the agent's process
  uint64_t bytes;  // equal to memtap_hello.ram_bytes
};

struct memtap_ack {
  uint32_t magic;
  uint32_t version;
  char code[24];
  char message[168];
};
