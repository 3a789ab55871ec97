/** One file of an initramfs. `mode` with the file type bits (0o100755, 0o040755, 0o020600). */
export interface CpioEntry {
  path: string;
  mode: number;
  data?: Uint8Array;
  /** Device number, for a device node. */
  device?: { major: number; minor: number };
}

/** A newc archive (Documentation/driver-api/early-userspace/buffer-format.rst), owner root, time 0. */
export function cpioArchive(entries: readonly CpioEntry[]): Buffer {
  const parts: Buffer[] = [];
  const add = (inode: number, { path, mode, data, device }: CpioEntry) => {
    const name = Buffer.from(`${path}\0`);
    const body = Buffer.from(data ?? []);
    const fields = [
      ...[inode, mode, 0, 0, 1, 0, body.length, 0, 0],
      ...[device?.major ?? 0, device?.minor ?? 0, name.length, 0],
    ];
    const head = `070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}`;
    const pad = (length: number) => Buffer.alloc(-length & 3);
    parts.push(Buffer.from(head), name, pad(head.length + name.length), body, pad(body.length));
  };
  entries.forEach((entry, index) => {
    add(index + 1, entry);
  });
  add(0, { path: 'TRAILER!!!', mode: 0 });
  return Buffer.concat(parts);
}
