// Folder states on a real file system: written out, and compared with what is there.
import {
  closeSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import { type FileState, type FolderState, PAGE } from './file-system.js';

/** Makes `folder` hold exactly `state`. */
export function writeFolder(folder: string, state: FolderState): void {
  mkdirSync(folder, { recursive: true });
  for (const name of readdirSync(folder)) rmSync(join(folder, name), { recursive: true });
  for (const [path, file] of state) {
    if (file === null) mkdirSync(join(folder, path), { recursive: true });
    else writeFile(join(folder, path), file);
  }
}

function writeFile(path: string, file: FileState): void {
  const fd = openSync(path, 'w', 0o600);
  try {
    ftruncateSync(fd, file.size);
    for (const [page, data] of file.pages) {
      const n = Math.min(PAGE, file.size - page * PAGE);
      if (n > 0) writeSync(fd, data, 0, n, page * PAGE);
    }
  } finally {
    closeSync(fd);
  }
}

/** All that a file of a state holds. */
export function contentOf(state: FolderState, path: string): Buffer {
  const file = state.get(path);
  if (file === undefined || file === null) throw new Error(`no file ${path}`);
  const data = Buffer.alloc(file.size);
  for (const [page, bytes] of file.pages) bytes.copy(data, page * PAGE);
  return data;
}

/** The state with more at the end of one of its files. */
export function appended(state: FolderState, path: string, data: Buffer): FolderState {
  const file = state.get(path);
  if (file === undefined || file === null) throw new Error(`no file ${path}`);
  const pages = new Map(file.pages);
  for (let done = 0; done < data.length; ) {
    const at = file.size + done;
    const page = Math.floor(at / PAGE);
    const next = Buffer.from(pages.get(page) ?? Buffer.alloc(PAGE));
    done += data.copy(next, at % PAGE, done);
    pages.set(page, next);
  }
  return new Map([...state, [path, { size: file.size + data.length, pages }]]);
}

/** What is not as `state` says, in words; empty if all is. */
export function differences(folder: string, state: FolderState): string[] {
  const out: string[] = [];
  const found = new Set<string>();
  const visit = (prefix: string) => {
    for (const entry of readdirSync(join(folder, prefix), { withFileTypes: true })) {
      const path = prefix + entry.name;
      found.add(path);
      const expected = state.get(path);
      if (expected === undefined) out.push(`${path} is there`);
      else if (entry.isDirectory()) visit(`${path}/`);
      else if (expected === null) out.push(`${path} is no directory`);
      else out.push(...fileDifferences(join(folder, path), path, expected));
    }
  };
  visit('');
  for (const path of state.keys()) if (!found.has(path)) out.push(`${path} is missing`);
  return out;
}

function fileDifferences(path: string, name: string, file: FileState): string[] {
  const data = readFileSync(path);
  if (data.length !== file.size) return [`${name} has ${data.length} bytes, not ${file.size}`];
  const zeros = Buffer.alloc(PAGE);
  const out: string[] = [];
  for (let at = 0; at < data.length; at += PAGE) {
    const end = Math.min(at + PAGE, data.length);
    const expected = (file.pages.get(at / PAGE) ?? zeros).subarray(0, end - at);
    if (!data.subarray(at, end).equals(expected)) out.push(`${name} differs in page ${at / PAGE}`);
  }
  return out;
}
