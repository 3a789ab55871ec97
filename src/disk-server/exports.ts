import { SnowflockError } from '../common/errors.js';
import { type NativeServer, native, type ServeOptions } from '../cow-disk/native.js';

export interface ExportPlace {
  socketPath: string;
  uid?: number;
  gid?: number;
  mode?: number;
}

/** A disk or a generation that is open. */
export interface Servable {
  readonly device: { serve(options: ServeOptions): NativeServer };
  close(): Promise<void> | void;
}

/** The NBD server of a store: its exports by name. */
export class Exports {
  readonly place: ExportPlace;
  readonly #served = new Map<string, { thing: Servable; server: NativeServer }>();

  constructor(place: ExportPlace) {
    this.place = place;
  }

  /** Takes over `thing`: it is closed with its export, or now if it cannot be served. */
  async add(name: string, description: string, thing: Servable): Promise<void> {
    try {
      if (this.#served.has(name)) throw new SnowflockError('E_EXISTS', `export ${name} exists`);
      const options = { socketPath: this.socketOf(name), exportName: name, description };
      const server = await native(() => thing.device.serve({ ...this.place, ...options }));
      this.#served.set(name, { thing, server });
    } catch (error) {
      await thing.close();
      throw error;
    }
  }

  socketOf(name: string): string {
    return `${this.place.socketPath}.${name}`;
  }

  has(name: string): boolean {
    return this.#served.has(name);
  }

  names(): string[] {
    return [...this.#served.keys()];
  }

  connections(name: string): number {
    return this.#served.get(name)?.server.stats().connections ?? 0;
  }

  /** Ends the export, its connections, and closes what it served. */
  async remove(name: string): Promise<void> {
    const found = this.#served.get(name);
    if (found === undefined) return;
    this.#served.delete(name);
    await native(() => found.server.close());
    await found.thing.close();
  }

  async close(): Promise<void> {
    const done = await Promise.allSettled(this.names().map((name) => this.remove(name)));
    const failed = done.find((one) => one.status === 'rejected');
    if (failed !== undefined) throw failed.reason;
  }
}
