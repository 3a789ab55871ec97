/**
 * Many clones forked at once: each has addresses and a tap of its own, and its first packet reaches
 * the parent. CLONES=64 for as many as the paper's figures have, HOSTS for other hosts; with few
 * processors many emulated guests take minutes.
 */
import { afterAll, beforeAll, expect, it } from 'vitest';
import { Lab, MIB, sh } from './lab.js';

const CLONES = Number(process.env.CLONES ?? 8);
const HOSTS = Number(process.env.HOSTS ?? 2);
const PARENT_IP = '10.86.0.2';
const RAM_MIB = 96;
const LIMIT_MS = 60_000 + CLONES * 15_000;

let lab: Lab;
let parent: string;

beforeAll(async () => {
  const memory_bytes = (CLONES + 2) * RAM_MIB * MIB;
  lab = await Lab.start(HOSTS, { resources: { cpus: CLONES + 2, memory_bytes } });
  parent = await lab.parent('parent', RAM_MIB);
});
afterAll(() => lab?.destroy());

it(
  `${CLONES} clones forked at once share no MAC, no IP, no tap; the first packet of each reaches the parent`,
  async () => {
    const start = performance.now();
    const fork = await lab.fork(parent, CLONES);
    const running_ms = Math.round(performance.now() - start);
    // One packet each, without a second try; slow guests may wait long for its answer.
    const ask = `ping -c 1 -W 60 ${PARENT_IP} && ip -4 -o addr show eth0 && cat /sys/class/net/eth0/address`;
    const said = await Promise.all(fork.clones.map((clone) => sh(lab.client, clone.vm, ask)));
    console.log(
      `${CLONES} clones on ${HOSTS} hosts: running after ${running_ms} ms, ` +
        `answers after ${Math.round(performance.now() - start)} ms`,
    );
    for (const [at, clone] of fork.clones.entries()) {
      expect(said[at]).toContain('1 packets transmitted, 1 packets received');
      expect(said[at]).toContain(`${clone.ip}/16`);
    }
    const vms = lab.records();
    expect(vms).toHaveLength(CLONES + 1);
    const distinct = (of: (vm: (typeof vms)[0]) => unknown) => new Set(vms.map(of)).size;
    expect(distinct((vm) => vm.tap)).toBe(CLONES + 1);
    expect(distinct((vm) => vm.vmid)).toBe(CLONES + 1);
    expect(new Set(fork.clones.map((clone) => clone.ip)).size).toBe(CLONES);
    expect(new Set(fork.clones.map((clone) => clone.wire_mac)).size).toBe(CLONES);
  },
  LIMIT_MS,
);
