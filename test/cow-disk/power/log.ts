// Reads what recorder.c wrote. The index of an entry is the clock of everything here: a cut "at k"
// is a power cut at the instant when the first k entries had happened.
import { readFileSync } from 'node:fs';

export const Kind = {
  start: 1,
  create: 2,
  link: 3,
  unlink: 4,
  rename: 5,
  write: 6,
  size: 7,
  zero: 8,
  syncBegin: 9,
  syncEnd: 10,
  accept: 11,
  sent: 12,
  stdout: 13,
} as const;

/** `a`, `b`, `c`: see enum Kind in recorder.c. */
export interface Entry {
  kind: number;
  a: number;
  b: number;
  c: number;
  data: Buffer;
  /** Where it begins in the log. */
  atByte: number;
}

const HEAD_BYTES = 32;

export function readLog(path: string): Entry[] {
  const log = readFileSync(path);
  const entries: Entry[] = [];
  for (let at = 0; at < log.length; ) {
    const bytes = log.readUInt32LE(at + 4);
    const end = at + HEAD_BYTES + bytes;
    if (end > log.length) throw new Error(`the log ends inside entry ${entries.length}`);
    entries.push({
      kind: log.readUInt32LE(at),
      a: Number(log.readBigUInt64LE(at + 8)),
      b: Number(log.readBigUInt64LE(at + 16)),
      c: Number(log.readBigUInt64LE(at + 24)),
      data: log.subarray(at + HEAD_BYTES, end),
      atByte: at,
    });
    at = end;
  }
  return entries;
}

/** Where an answer was given: before the log; so many bytes on a connection, or a line with this id on stdout. */
export type Answer =
  | 'always'
  | { process: number; connection: number; bytes: number }
  | { process: number; line: number };

/** Finds the instants of answers. Processes and connections count from 0 in the order they began. */
export class Answers {
  readonly #sent = new Map<string, { bytes: number; at: number }[]>();
  readonly #lines = new Map<string, number>();

  constructor(entries: Entry[]) {
    let process = -1;
    let text = '';
    for (const [at, entry] of entries.entries()) {
      if (entry.kind === Kind.start) {
        process++;
        text = '';
      } else if (entry.kind === Kind.sent) {
        const key = `${process} ${entry.a}`;
        const list = this.#sent.get(key) ?? [];
        this.#sent.set(key, list);
        list.push({ bytes: (list.at(-1)?.bytes ?? 0) + entry.b, at });
      } else if (entry.kind === Kind.stdout) {
        const lines = (text + entry.data.toString()).split('\n');
        text = lines.pop() ?? '';
        for (const line of lines) {
          const { id } = JSON.parse(line) as { id: number };
          this.#lines.set(`${process} ${id}`, at);
        }
      }
    }
  }

  /** The first cut at which the answer may have been out. */
  cut(answer: Answer): number {
    if (answer === 'always') return 0;
    const at =
      'line' in answer
        ? this.#lines.get(`${answer.process} ${answer.line}`)
        : this.#sent
            .get(`${answer.process} ${answer.connection}`)
            ?.find((sent) => sent.bytes >= answer.bytes)?.at;
    if (at === undefined) throw new Error(`not in the log: ${JSON.stringify(answer)}`);
    return at + 1;
  }
}
