import { join, resolve } from 'node:path';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import type { Store } from '../cow-disk/store.js';
import type { GenerationEntry } from '../cow-disk/store-api.js';
import { type Published, publishGeneration } from './publish.js';
import { readSourceFile, type Source, writeSourceFile } from './source-file.js';

export interface PublishPlan {
  /** IPv4 address of this host that other hosts reach. */
  address: string;
  /** UDP; default: that of the source file if there is one, else any. */
  port?: number;
  /** Default: `DISK@GENERATION.source` in the store. */
  sourceFile?: string;
}

export interface Publication {
  disk: string;
  generation: string;
  source_file: string;
  source: Source;
}

/** What of a store is offered to other hosts. */
export class Publications {
  readonly #store: Store;
  readonly #open = new Map<string, Publication & { published: Published; close(): void }>();

  constructor(store: Store) {
    this.#store = store;
  }

  /**
   * Publishes a generation and writes its source file. If that file is there already, it is of the
   * same generation (E_EXISTS) and stays as it is, so that copies of it stay good: key, group and
   * port are used again. E_IN_USE (the port), E_NETWORK, E_IO, E_CONFIG.
   */
  async add(entry: GenerationEntry, plan: PublishPlan): Promise<Publication> {
    const { id, disk, size_bytes } = entry;
    const generation = entry.name ?? id;
    const source_file = resolve(
      plan.sourceFile ?? join(this.#store.directory, `${disk}@${generation}.source`),
    );
    const previous = await readSourceFile(source_file).catch((error: unknown) => {
      if (asSnowflockError(error).code === 'E_NOT_FOUND') return undefined;
      throw error;
    });
    if (previous !== undefined && previous.generation !== id) {
      throw new SnowflockError(
        'E_EXISTS',
        `${source_file} is the source of another generation (${previous.generation}); remove it, or give another --source-file`,
      );
    }
    const view = await this.#store.openGeneration(disk, id);
    try {
      const published = await publishGeneration(
        { provider: async () => view.provider(), info: () => ({ sizeBytes: size_bytes }) },
        id,
        {
          address: plan.address,
          ...(plan.port === undefined ? {} : { port: plan.port }),
          ...(previous === undefined ? {} : { previous }),
        },
      );
      const { source } = published;
      const made = { disk, generation, source_file, source };
      this.#open.set(id, { ...made, published, close: () => view.close() });
      await writeSourceFile(source_file, source);
      return made;
    } catch (error) {
      await this.#end(id);
      view.close();
      throw error;
    }
  }

  /** E_IN_USE if one that `concerns` it is published. */
  check(concerns: (one: { disk: string; id: string }) => boolean): void {
    for (const [id, { disk, generation }] of this.#open) {
      if (!concerns({ disk, id })) continue;
      throw new SnowflockError('E_IN_USE', `${disk}@${generation} is published to other hosts`);
    }
  }

  async close(): Promise<void> {
    for (const id of [...this.#open.keys()]) await this.#end(id);
  }

  async #end(id: string): Promise<void> {
    const found = this.#open.get(id);
    this.#open.delete(id);
    await found?.published.close();
    found?.close();
  }
}
