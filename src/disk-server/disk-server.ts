import type { Disk, ServedExport, ServeOptions, SharedServer } from '../cow-disk/disk.js';

/**
 * Whoever gives pages of generations to other hosts (the mcdist server). What else it needs, such as
 * the key, the group and the rate, is its own affair and passes through.
 */
export interface PageServer<Options extends object, Result> {
  serve(options: Options & { generation: string; provider: unknown }): Result;
}

/** Offers a disk's generation to other hosts, by a page server that is there already. */
export async function exportGeneration<Options extends object, Result>(
  server: PageServer<Options, Result>,
  disk: Pick<Disk, 'provider'>,
  generation: string,
  options: Options,
): Promise<Result> {
  return server.serve({ ...options, generation, provider: await disk.provider(generation) });
}

/**
 * Serves a whole generation, read-only, by NBD, for `nbdcopy`, `qemu-img convert` and the like. The
 * export's name is the generation unless one is given. Pages that a replica has not got are fetched.
 */
export function serveGeneration(
  disk: Disk,
  generation: string,
  options: ServeOptions | SharedServer,
): Promise<ServedExport> {
  return disk.serveGeneration(generation, {
    exportName: generation,
    description: `generation ${generation}, read-only`,
    ...options,
  });
}
