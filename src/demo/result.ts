import type { CloneResult, ForkRecord, WireStats } from '../api/client.js';
import { mib, ms, table } from '../cli/output.js';

/** The figures of one demo run; what `--json` writes. All are measured in this run. */
export interface DemoResult {
  clones: number;
  hosts: number;
  ram_mib: number;
  parent_pause_ms: number | null;
  descriptor_bytes: number;
  fork_ms: number | null;
  wire_bytes_sent: number;
  wire_ram_bytes_sent: number;
  wire_disk_bytes_sent: number;
  results: {
    vmid: number;
    host: string;
    ip: string;
    wire_mac: string;
    running_ms: number | null;
    reply_ms: number | null;
    pages_fetched: number | null;
    ok: boolean;
  }[];
  answer: string;
  expected: string;
  answer_ok: boolean;
}

export function demoResult(
  asked: { hosts: number; ramBytes: number },
  fork: ForkRecord,
  wire: WireStats | null,
  answer: { answer: string; expected: string; ok: boolean },
): DemoResult {
  const ram = wire?.ram.wireBytes ?? 0;
  const disk = wire?.disk.wireBytes ?? 0;
  return {
    clones: fork.clones.length,
    hosts: asked.hosts,
    ram_mib: asked.ramBytes / 2 ** 20,
    parent_pause_ms: round(fork.parent_pause_ms),
    descriptor_bytes: fork.descriptor_bytes,
    fork_ms: round(fork.fork_ms),
    wire_bytes_sent: ram + disk,
    wire_ram_bytes_sent: ram,
    wire_disk_bytes_sent: disk,
    results: fork.clones.map((clone) => ({
      vmid: clone.vmid,
      host: clone.host,
      ip: clone.ip,
      wire_mac: clone.wire_mac,
      running_ms: round(clone.running_ms),
      reply_ms: round(clone.reply_ms),
      pages_fetched: clone.end?.pages_fetched ?? null,
      ok: succeeded(clone),
    })),
    answer: answer.answer,
    expected: answer.expected,
    answer_ok: answer.ok,
  };
}

export function succeeded(clone: CloneResult): boolean {
  return clone.ok && clone.end?.reason === 'exit' && clone.end.status === 0;
}

function round(value: number | null): number | null {
  return value === null ? null : Math.round(value * 100) / 100;
}

/** The table a person reads. */
export function describe(result: DemoResult): string {
  const pages = (result.ram_mib * 2 ** 20) / 4096;
  const copies = result.clones * result.ram_mib * 2 ** 20;
  const share = copies === 0 ? 0 : (100 * result.wire_bytes_sent) / copies;
  const rows = result.results.map((one) => [
    one.vmid,
    one.host,
    one.ip,
    one.wire_mac,
    ms(one.running_ms),
    ms(one.reply_ms),
    one.pages_fetched ?? '-',
    one.ok ? 'ok' : 'FAILED',
  ]);
  const header = ['vmid', 'host', 'ip', 'wire mac', 'running', 'reply', 'fetched', 'result'];
  return [
    table(header, rows),
    '',
    `parent pause      ${ms(result.parent_pause_ms)}`,
    `descriptor        ${(result.descriptor_bytes / 1024).toFixed(1)} KiB`,
    `fork              ${ms(result.fork_ms)} from the request to the last clone running`,
    `pages             each clone has ${pages}; "fetched" is what it waited for`,
    `bytes sent        ${mib(result.wire_bytes_sent)} by the source, ${share.toFixed(1)}% of ${result.clones} copies of the RAM (${mib(copies)})`,
    `answer            ${result.answer}, ${result.answer_ok ? 'the same as without clones' : `WRONG: without clones it is ${result.expected}`}`,
  ].join('\n');
}
