import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { SnowflockError } from '../../src/common/errors.js';

export interface Load {
  readonly rw: 'randread' | 'randwrite' | 'read' | 'write';
  readonly block_bytes: number;
  /** Requests under way at once. */
  readonly queue: number;
  /** The area, from 0 on. */
  readonly area_bytes: number;
  /** Absent: the area once. Else over and over, for that long. */
  readonly runtime_ms?: number;
  /** Runs the client on this CPU only. */
  readonly cpu?: number;
  /** With `runtime_ms`: no block twice; ends early when the area was seen once. */
  readonly once?: boolean;
}

export interface Measured {
  readonly requests: number;
  readonly request_rate: number;
  readonly p50_us: number;
  readonly p99_us: number;
}

interface Side {
  total_ios: number;
  iops: number;
  clat_ns: { percentile: Record<string, number> };
}

/** Runs fio's NBD client (one connection) against a Unix socket. The order of blocks is fixed. */
export async function runFio(uri: string, load: Load, signal: AbortSignal): Promise<Measured> {
  const argv = [
    '--name=bench',
    '--ioengine=nbd',
    `--uri=${uri}`,
    `--rw=${load.rw}`,
    `--bs=${load.block_bytes}`,
    `--iodepth=${load.queue}`,
    `--size=${load.area_bytes}`,
    '--output-format=json',
  ];
  if (load.runtime_ms !== undefined) argv.push(`--runtime=${load.runtime_ms}ms`);
  if (load.runtime_ms !== undefined && load.once !== true) argv.push('--time_based');
  if (load.cpu !== undefined) argv.push(`--cpus_allowed=${load.cpu}`);
  const { stdout } = await promisify(execFile)('fio', argv, { signal, maxBuffer: 2 ** 24 });
  const report = JSON.parse(stdout.slice(stdout.indexOf('{'))) as {
    jobs: { error: number; read: Side; write: Side }[];
  };
  const job = report.jobs[0];
  const side = load.rw.endsWith('read') ? job?.read : job?.write;
  if (job?.error !== 0 || side === undefined || side.total_ios === 0) {
    throw new SnowflockError('E_IO', `fio ${argv.join(' ')} ended with error ${job?.error}`);
  }
  return {
    requests: side.total_ios,
    request_rate: side.iops,
    p50_us: (side.clat_ns.percentile['50.000000'] ?? Number.NaN) / 1000,
    p99_us: (side.clat_ns.percentile['99.000000'] ?? Number.NaN) / 1000,
  };
}
