import type { Descriptor } from '../../src/descriptor/index.js';

/** A descriptor of a small VM; `pages` of RAM, none of them zero unless a map is given. */
export function sample(pages = 4096, zeroMap?: Buffer): Descriptor {
  const source = {
    address: '10.77.0.1',
    port: 7001,
    group: '239.86.0.1',
    group_port: 7002,
    key: 'ab'.repeat(32),
  };
  return {
    created_ms: 1_700_000_000_000,
    parent: { vm: 'vm-1', host: 'host-a', vmid: 0 },
    machine: {
      driver: 'qemu',
      version: '7.2.22',
      machine: 'pc',
      accel: 'tcg',
      cpu: 'max',
      vcpus: 1,
      ram_bytes: pages * 4096,
      ram_layout: [{ guest_address: 0, offset: 0, length: pages * 4096 }],
      devices: ['{"driver":"virtio-blk-pci"}'],
    },
    ram: { generation: '0123456789abcdef'.repeat(2), pages, source },
    disk: {
      generation: 'fedcba9876543210'.repeat(2),
      pages: 2 ** 21,
      source: { ...source, port: 7003, key: 'cd'.repeat(32) },
    },
    identity: { family: 0xabcdef, guest_mac: '52:54:00:53:46:01', network: '10.86.0.0/16' },
    state: Buffer.from('device state '.repeat(20)),
    zero_map: zeroMap ?? Buffer.alloc(Math.ceil(pages / 8)),
  };
}
