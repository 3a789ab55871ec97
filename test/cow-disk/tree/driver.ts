/** What the model test needs of disks under test; all disks have the same size. */
export interface TreeDriver {
  readonly sizeBytes: number;
  /** Names of the disks there are at first; all zeros. */
  readonly disks: string[];
  read(disk: string, offset: number, length: number): Promise<Buffer>;
  write(disk: string, offset: number, data: Buffer, fua: boolean): Promise<void>;
  zero(disk: string, offset: number, length: number): Promise<void>;
  /** Zeroes the pages wholly covered, and changes no others. */
  trim(disk: string, offset: number, length: number): Promise<void>;
  flush(disk: string): Promise<void>;
  /** Closes the disk; whatever uses it next opens it. */
  close(disk: string): Promise<void>;
  snapshot(disk: string, generation: string): Promise<void>;
  /** Of all disks. */
  generations(): Promise<string[]>;
  readGeneration(disk: string, generation: string): Promise<Buffer>;
  dropGeneration(disk: string, generation: string): Promise<void>;
  /** A new disk `name` on a generation of `disk`. */
  clone(disk: string, generation: string, name: string): Promise<void>;
  removeDisk(disk: string): Promise<void>;
  /** The disk holds again what the generation holds. */
  rollback(disk: string, generation: string): Promise<void>;
  /** Cuts the disk loose from what is below it. */
  flatten(disk: string): Promise<void>;
  /** The disk's content becomes that of its origin (the result), and it goes; or nothing changes. */
  commit(disk: string): Promise<string | undefined>;
  /** Resolves when background work is done; none of it has failed. */
  settled(): Promise<void>;
  /** Closes everything, checks what is there, and opens it again. */
  reopen(): Promise<void>;
  /** The same with a kill of the serving process, with what is under way. */
  kill(): Promise<void>;
}
