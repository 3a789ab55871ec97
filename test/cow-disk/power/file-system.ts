// What a folder may hold after a power cut, from a log of the calls made below it.
//
// Data. The page cache holds pages of 4096 bytes; the kernel writes a page out at any instant and in
// any order. So after a cut at k a page holds what it held at some instant between the last sync of
// its file that had ended by k (the instant at which that sync began) and k. The device writes a
// page whole; with tearing (`tear`), each sector of 512 bytes of a page that never held anything
// before has an instant of its own. A file's size has such an instant too, independent of its pages:
// a file may be longer than what arrived of its data (zeros), or shorter. With tearing, a file that
// was growing may end at any byte in between.
//
// Directories. A creation, link, unlink or rename takes effect whole. It is durable when a sync of
// each directory it changed, begun after it, has ended. What is not durable:
//  - ordered (as a file system with one journal does): some prefix of all directory operations, at
//    least up to the last durable one. Fewer promises than ext4 and XFS give: there fsync of a new
//    file makes its name durable too.
//  - hostile: any subset. fsync of the directory is all that counts.
// Either is independent of data: a new name may be there and its file empty.
//
// Left out: mtimes, modes, owners; removal of a non-empty directory; failed syncs count as none.
import { readdirSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { type Entry, Kind } from './log.js';

export const PAGE = 4096;
const SECTOR = 512;

/** Content of a page from instant `at` on; null: a hole. */
interface PageVersion {
  at: number;
  data: Buffer | null;
}

interface Sync {
  begin: number;
  end: number;
}

export class File {
  readonly pages = new Map<number, PageVersion[]>();
  readonly sizes: { at: number; size: number }[] = [];
  readonly syncs: Sync[] = [];

  constructor(
    readonly id: number,
    readonly directory: boolean,
  ) {}
}

interface DirectoryOperation {
  at: number;
  folders: File[];
  changes: { folder: File; name: string; file: File | null }[];
}

/** How the unsynced part of a state is chosen. Each is called once for each choice there is. */
export interface Chooser {
  /** Which of `count` versions, 0 being the synced one; `newest` is when the last one was made. */
  page(file: File, page: number, count: number, newest: number): number;
  size(file: File, count: number): number;
  /** Sector by sector, and sizes byte by byte, where that is allowed. */
  tear: boolean;
  /** Ordered: how many of the `count` directory operations after the last durable one happened. */
  prefix(count: number): number;
  /** Hostile, instead of ordered: whether this unsynced directory operation happened. */
  happened?: () => boolean;
  /** A number in [0, 1). */
  random(): number;
}

export interface FileState {
  size: number;
  pages: Map<number, Buffer>;
}

/** Paths relative to the folder; a directory is null. */
export type FolderState = Map<string, FileState | null>;

/** The last element of an instant before k, or -1. */
function indexAt(list: { at: number }[], k: number): number {
  let index = -1;
  while (index + 1 < list.length && (list[index + 1]?.at ?? 0) < k) index++;
  return index;
}

export class RecordedFolder {
  readonly #root: File;
  readonly #files = new Map<number, File>(); // by inode number, as bound now
  readonly #everything: Sync[] = []; // sync(), syncfs()
  readonly #operations: DirectoryOperation[] = [];
  #count = 0;

  /** Begins with what `folder` holds now, all of it durable. */
  constructor(folder: string) {
    this.#root = this.#scan(folder);
  }

  #file(inode: number, directory: boolean): File {
    const file = new File(this.#count++, directory);
    this.#files.set(inode, file);
    return file;
  }

  #scan(path: string): File {
    const found = statSync(path);
    const file = this.#file(found.ino, found.isDirectory());
    if (!file.directory) {
      file.sizes.push({ at: -1, size: 0 });
      this.#write(file, -1, 0, readFileSync(path));
      return file;
    }
    for (const name of readdirSync(path)) {
      const child = this.#scan(join(path, name));
      this.#operations.push({
        at: -1,
        folders: [],
        changes: [{ folder: file, name, file: child }],
      });
    }
    return file;
  }

  play(entries: Entry[]): void {
    const begun = new Map<string, number>();
    let process = 0;
    for (const [at, entry] of entries.entries()) {
      const { kind, a, b, c, data } = entry;
      const file = () => {
        const found = this.#files.get(a);
        if (found === undefined) throw new Error(`entry ${at}: unknown inode ${a}`);
        return found;
      };
      if (kind === Kind.start) process++;
      else if (kind === Kind.write) this.#write(file(), at, b, data);
      else if (kind === Kind.size) this.#resize(file(), at, b);
      else if (kind === Kind.zero) this.#zero(file(), at, b, c);
      else if (kind === Kind.syncBegin) begun.set(`${process} ${b}`, at);
      else if (kind === Kind.syncEnd) this.#sync(at, a, c, begun.get(`${process} ${b}`));
      else if (kind >= Kind.create && kind <= Kind.rename) this.#operate(entry, at);
    }
  }

  #sync(at: number, inode: number, error: number, begin: number | undefined): void {
    if (begin === undefined) throw new Error(`entry ${at}: a sync ends that did not begin`);
    if (error !== 0) return;
    if (inode === 0) this.#everything.push({ begin, end: at });
    else this.#files.get(inode)?.syncs.push({ begin, end: at });
  }

  #operate(entry: Entry, at: number): void {
    const { kind, a, b, c, data } = entry;
    const folder = this.#files.get(a);
    if (folder === undefined) throw new Error(`entry ${at}: unknown directory ${a}`);
    const [name = '', other = ''] = data.toString().split('\0');
    const folders = [folder];
    const changes: DirectoryOperation['changes'] = [];
    if (kind === Kind.create) {
      const file = this.#file(b, c !== 0);
      if (!file.directory) file.sizes.push({ at, size: 0 });
      changes.push({ folder, name, file });
    } else if (kind === Kind.link) {
      changes.push({ folder, name, file: this.#files.get(b) ?? null });
    } else if (kind === Kind.unlink) {
      changes.push({ folder, name, file: null });
    } else {
      const target = this.#files.get(b);
      const file = this.#lookup(folder, name);
      if (target === undefined || file === null) throw new Error(`entry ${at}: bad rename`);
      if (target !== folder) folders.push(target);
      changes.push({ folder, name, file: null }, { folder: target, name: other, file });
    }
    this.#operations.push({ at, folders, changes });
  }

  #lookup(folder: File, name: string): File | null {
    for (const operation of this.#operations.toReversed()) {
      const change = operation.changes.findLast((c) => c.folder === folder && c.name === name);
      if (change !== undefined) return change.file;
    }
    return null;
  }

  #versions(file: File, page: number): PageVersion[] {
    let list = file.pages.get(page);
    if (list === undefined) {
      list = [{ at: -1, data: null }];
      file.pages.set(page, list);
    }
    return list;
  }

  #patch(file: File, at: number, offset: number, length: number, data: Buffer | null): void {
    for (let done = 0; done < length; ) {
      const page = Math.floor((offset + done) / PAGE);
      const within = (offset + done) % PAGE;
      const n = Math.min(PAGE - within, length - done);
      const list = this.#versions(file, page);
      const before = list.at(-1)?.data ?? null;
      if (data !== null || (before !== null && n < PAGE)) {
        const next = before === null ? Buffer.alloc(PAGE) : Buffer.from(before);
        if (data === null) next.fill(0, within, within + n);
        else data.copy(next, within, done, done + n);
        list.push({ at, data: next });
      } else if (before !== null) {
        list.push({ at, data: null });
      }
      done += n;
    }
  }

  #write(file: File, at: number, offset: number, data: Buffer): void {
    this.#patch(file, at, offset, data.length, data);
    if (offset + data.length > (file.sizes.at(-1)?.size ?? 0)) {
      file.sizes.push({ at, size: offset + data.length });
    }
  }

  #zero(file: File, at: number, offset: number, length: number): void {
    const end = Math.min(offset + length, file.sizes.at(-1)?.size ?? 0);
    if (end > offset) this.#patch(file, at, offset, end - offset, null);
  }

  #resize(file: File, at: number, size: number): void {
    const before = file.sizes.at(-1)?.size ?? 0;
    if (size < before) this.#patch(file, at, size, before - size, null);
    if (size !== before) file.sizes.push({ at, size });
  }

  /** The instant up to which all of `file` is durable if the power goes at k. */
  #syncedAt(file: File, k: number): number {
    let begin = 0; // what was there at first is durable
    for (const list of [file.syncs, this.#everything]) {
      for (const sync of list) if (sync.end < k) begin = Math.max(begin, sync.begin);
    }
    return begin;
  }

  /** A state that the folder may be in after a power cut at k. */
  cut(k: number, chooser: Chooser): FolderState {
    const names = new Map<File, Map<string, File>>();
    for (const operation of this.#happened(k, chooser)) {
      for (const { folder, name, file } of operation.changes) {
        const entries = names.get(folder) ?? new Map<string, File>();
        names.set(folder, entries);
        if (file === null) entries.delete(name);
        else entries.set(name, file);
      }
    }
    const state: FolderState = new Map();
    const visit = (folder: File, prefix: string) => {
      for (const [name, file] of names.get(folder) ?? []) {
        const path = prefix + name;
        state.set(path, file.directory ? null : this.#content(file, k, chooser));
        if (file.directory) visit(file, `${path}/`);
      }
    };
    visit(this.#root, '');
    return state;
  }

  #happened(k: number, chooser: Chooser): DirectoryOperation[] {
    const all = this.#operations.filter((operation) => operation.at < k);
    const durable = all.map((operation) =>
      operation.folders.every((folder) => this.#syncedAt(folder, k) > operation.at),
    );
    const { happened } = chooser;
    if (happened !== undefined) return all.filter((_, i) => durable[i] === true || happened());
    const first = durable.lastIndexOf(true) + 1;
    return all.slice(0, first + chooser.prefix(all.length - first));
  }

  #content(file: File, k: number, chooser: Chooser): FileState {
    const synced = this.#syncedAt(file, k);
    const sizes = file.sizes.slice(0, indexAt(file.sizes, k) + 1);
    const floor = Math.max(0, indexAt(sizes, synced));
    const picked = floor + chooser.size(file, sizes.length - floor);
    let size = sizes[picked]?.size ?? 0;
    const before = sizes[picked - 1]?.size ?? 0;
    if (chooser.tear && picked > floor && size > before) {
      size = before + Math.ceil(chooser.random() * (size - before));
    }
    const pages = new Map<number, Buffer>();
    for (const [page, list] of file.pages) {
      const newest = indexAt(list, k);
      const oldest = Math.max(0, indexAt(list, synced));
      const versions = list.slice(oldest, newest + 1);
      const count = versions.length;
      const last = versions.at(-1);
      if (last === undefined) continue;
      const pick = () => (count === 1 ? 0 : chooser.page(file, page, count, last.at));
      const data = versions[pick()]?.data ?? null;
      const fresh = list.slice(0, oldest + 1).every((version) => version.data === null);
      if (chooser.tear && fresh && count > 1) {
        const torn = Buffer.alloc(PAGE);
        for (let at = 0; at < PAGE; at += SECTOR) {
          versions[pick()]?.data?.copy(torn, at, at, at + SECTOR);
        }
        pages.set(page, torn);
      } else if (data !== null) {
        pages.set(page, data);
      }
    }
    return { size, pages };
  }
}
