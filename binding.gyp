{
  # One addon for everything that moves bytes (they share replicas in memory), one for the network
  # (libbpf, AF_PACKET), one plain library that QEMU preloads.
  "target_defaults": {
    "cflags_cc!": ["-fno-exceptions", "-fno-rtti", "-std=gnu++17", "-std=gnu++20"],
    "cflags_cc": ["-std=c++20", "-fexceptions", "-O2", "-g", "-Wall", "-Wextra", "-Werror",
                  "-Wno-unused-parameter", "-Wno-missing-field-initializers", "-pthread"],
    "include_dirs": ["<!(node -p \"require('node-addon-api').include_dir\")", "native"],
    "defines": ["NAPI_VERSION=8", "_GNU_SOURCE", "_FILE_OFFSET_BITS=64"],
  },
  "targets": [
    {
      "target_name": "dataplane",
      "sources": ["<!@(node scripts/native-sources.mjs common pagestore memtap mcdist blktap dataplane)"],
      "libraries": ["-lsodium", "-luring", "-lgnutls", "-llz4"],
    },
    {
      "target_name": "netback",
      "sources": ["<!@(node scripts/native-sources.mjs common netback)"],
      "libraries": ["-lbpf"],
      "include_dirs": ["."],
      "dependencies": ["netback_bpf"],
    },
    {
      "target_name": "netback_bpf",
      "type": "none",
      "actions": [{
        "action_name": "clang_bpf",
        "inputs": ["kernel/netback/netback.bpf.c", "kernel/netback/netback.h",
                   "kernel/netback/reasons.h", "scripts/bpf-build.mjs"],
        "outputs": ["<(PRODUCT_DIR)/netback.bpf.o"],
        "action": ["node", "scripts/bpf-build.mjs", "<(PRODUCT_DIR)/netback.bpf.o"],
      }],
    },
    {
      # Preloaded into QEMU: plain C, nothing but libc, nothing exported but what it interposes.
      "target_name": "memtap-agent",
      # A shared_library, as node-gyp names every loadable module .node; and beside the addons.
      "type": "shared_library",
      "product_dir": "<(PRODUCT_DIR)",
      "product_prefix": "",
      "product_extension": "so",
      "sources": ["native/agent/agent.c"],
      "cflags": ["-std=gnu17", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-pthread",
                 "-fvisibility=hidden"],
      "ldflags": ["-Wl,-z,now", "-Wl,-z,relro"],
    },
  ],
}
