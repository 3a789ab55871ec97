// What the model test needs of disks under test. A driver gives what its disks can do; the generator
// chooses only among that. Sizes are the same for all disks.
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
  snapshot(disk: string, generation: string): Promise<void>;
  /** The disk's generations, oldest first; without a disk: of all. */
  generations(disk?: string): Promise<string[]>;
  readGeneration(generation: string): Promise<Buffer>;
  dropGeneration(generation: string): Promise<void>;
  /** Closes everything and opens it again. */
  reopen(): Promise<void>;
  /** Kills the serving process, with what is under way, and starts another one. */
  kill(): Promise<void>;
  /** A new disk on a generation. */
  clone?(generation: string, disk: string): Promise<void>;
  removeDisk?(disk: string): Promise<void>;
  /** The disk holds again what the generation holds. */
  rollback?(disk: string, generation: string): Promise<void>;
  /** Cuts the disk loose from what is below it. */
  flatten?(disk: string): Promise<void>;
  /** Resolves when background work is done. */
  settled?(): Promise<void>;
}
