import { SnowflockError } from '../common/errors.js';
import {
  type LocalListenOptions,
  NbdServer,
  type ServedExport,
  type SharedServer,
} from '../cow-disk/nbd-server.js';

/** Of one server (native/blktap/nbd_exports.h). */
export const MAX_EXPORTS = 1024;

/** A disk or a generation that is open. */
export interface Servable {
  serve(options: SharedServer): Promise<ServedExport>;
  close(): Promise<void> | void;
}

/** The NBD server of a store: its exports by name. It listens from its first export on, or from `listen()`. */
export class Exports {
  readonly place: LocalListenOptions;
  #server: Promise<NbdServer> | undefined;
  readonly #served = new Map<string, { thing: Servable; served: ServedExport }>();

  constructor(place: LocalListenOptions) {
    this.place = place;
  }

  /** Takes over `thing`: it is closed with its export, or now if it cannot be served. */
  async add(name: string, description: string, thing: Servable): Promise<void> {
    try {
      if (this.#served.has(name)) throw new SnowflockError('E_EXISTS', `export ${name} exists`);
      const server = await this.listen();
      const served = await thing.serve({ server, exportName: name, description });
      this.#served.set(name, { thing, served });
    } catch (error) {
      await thing.close();
      throw error;
    }
  }

  listen(): Promise<NbdServer> {
    if (this.#server === undefined) {
      this.#server = NbdServer.start(this.place);
      this.#server.catch(() => {
        this.#server = undefined; // the next export tries again
      });
    }
    return this.#server;
  }

  has(name: string): boolean {
    return this.#served.has(name);
  }

  names(): string[] {
    return [...this.#served.keys()];
  }

  connections(name: string): number {
    return this.#served.get(name)?.served.connections() ?? 0;
  }

  /** Ends the export, its connections, and closes what it served. */
  async remove(name: string): Promise<void> {
    const found = this.#served.get(name);
    if (found === undefined) return;
    this.#served.delete(name);
    await found.served.close();
    await found.thing.close();
  }

  async close(): Promise<void> {
    const done = await Promise.allSettled(this.names().map((name) => this.remove(name)));
    const server = await this.#server?.catch(() => undefined);
    await server?.close();
    const failed = done.find((one) => one.status === 'rejected');
    if (failed !== undefined) throw failed.reason;
  }
}
