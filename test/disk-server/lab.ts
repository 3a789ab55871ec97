import { randomBytes } from 'node:crypto';
import { join } from 'node:path';
import { projectRoot } from '../../src/common/native.js';
import type { McdistClientStats, McdistPolicyOptions } from '../../src/mcdist/mcdist.js';
import type { RemoteReplicaStats } from '../../src/pagestore/remote-replica.js';
import { cleanup, connectTo, PAGE } from '../blktap/support.js';
import { type Host, Net } from '../mcdist/net.js';

export type Stats = RemoteReplicaStats & {
  client: McdistClientStats | null;
  code: string | null;
  completed: boolean;
  troubles: string[];
};

/** Two hosts and more; on the first a disk whose generation is published. */
export class Lab {
  private constructor(
    readonly net: Net,
    readonly folder: string,
    readonly source: Host,
    /** What the generation holds. */
    readonly image: Buffer,
    readonly generation: string,
    readonly file: string,
  ) {}

  /** `zeros`: pages at the end that hold nothing. */
  static async make(
    pages: number,
    options: { zeros?: number; policy?: McdistPolicyOptions } = {},
  ): Promise<Lab> {
    const here = join(projectRoot, 'test');
    const net = await Net.make(1500, [
      '--import',
      join(here, 'blktap', 'ts-loader.mjs'),
      join(here, 'disk-server', 'host.ts'),
    ]);
    cleanup(() => net.close());
    const folder = await net.folder;
    const source = await net.host();
    const data = pages - (options.zeros ?? 0);
    const image = Buffer.alloc(pages * PAGE);
    randomBytes(data * PAGE).copy(image);
    const directory = join(folder, 'parent');
    const sizeBytes = pages * PAGE;
    const socket = await source.call<string>('disk', { name: 'parent', directory, sizeBytes });
    const client = await connectTo(socket);
    for (let at = 0; at < data * PAGE; at += 1 << 20) {
      await client.write(at, image.subarray(at, Math.min(at + (1 << 20), data * PAGE)));
    }
    const generation = randomBytes(16).toString('hex');
    const file = join(folder, 'source.json');
    await source.call('publish', {
      name: 'parent',
      generation,
      address: source.address,
      file,
      policy: options.policy,
    });
    // The parent goes on; nothing of that is in the generation.
    await client.write(0, Buffer.alloc(data * PAGE, 0xee).subarray(0, 64 * PAGE));
    return new Lab(net, folder, source, image, generation, file);
  }

  page(number: number, count = 1): Buffer {
    return this.image.subarray(number * PAGE, (number + count) * PAGE);
  }

  async remote(
    host: Host,
    options: { prefetch?: number; sourceTimeoutMs?: number; name?: string } = {},
  ): Promise<void> {
    await host.call('remote', {
      name: 'remote',
      file: this.file,
      replica: join(this.folder, `replica-${host.namespace}`),
      ...options,
    });
  }

  /** A disk over the remote generation of `host`, and a client of it. */
  async clone(host: Host, name = 'clone', create = true, remote = 'remote') {
    const directory = join(this.folder, `${name}-${host.namespace}`);
    return connectTo(await host.call<string>('clone', { name, remote, directory, create }));
  }

  stats(host: Host, name = 'remote'): Promise<Stats> {
    return host.call<Stats>('stats', { name });
  }
}
