/**
 * Both ends of a store's control socket. The caller's end is a StoreService like the store itself,
 * so a command need not know whether the store is served.
 */
import { join } from 'node:path';
import { SnowflockError } from '../common/errors.js';
import type { Logger } from '../common/log.js';
import { type Caller, RpcClient, RpcServer } from '../common/rpc.js';
import { checkSource } from '../disk-server/source-file.js';
import {
  CONTROL_ANSWER_BYTES,
  CONTROL_CALL_BYTES,
  CONTROL_CALLS,
  CONTROL_CONNECTIONS,
  type ControlMethods,
  checkControlCall,
  type ImportTarget,
  type NbdPlace,
  type OpenView,
  type StoreService,
} from './control-protocol.js';
import type { StoreListing, StoreTask, StoreUsage } from './store-api.js';

/** Imports and views one connection may have open at once. */
const HANDLES = 16;

export function controlSocket(directory: string): string {
  return join(directory, 'store.sock');
}

/** What a connection has open; all of it ends with the connection. */
class Handles {
  readonly #open = new Map<number, { value: ImportTarget | OpenView; end: () => Promise<void> }>();
  #next = 1;
  #opening = 0;
  #ended = false;
  readonly #failed: (error: unknown) => void;

  constructor(caller: Caller, failed: (error: unknown) => void) {
    this.#failed = failed;
    caller.closed.once('closed', () => {
      this.#ended = true;
      for (const { end } of this.#open.values()) void end().catch(failed);
      this.#open.clear();
    });
  }

  async add<T extends ImportTarget | OpenView>(
    make: () => Promise<T>,
    end: (value: T) => Promise<void>,
  ): Promise<NbdPlace & { handle: number }> {
    if (this.#open.size + this.#opening >= HANDLES) {
      throw new SnowflockError('E_STATE', `over ${HANDLES} imports and exports on one connection`);
    }
    this.#opening++;
    let value: T;
    try {
      value = await make();
    } finally {
      this.#opening--;
    }
    if (this.#ended) {
      await end(value).catch(this.#failed);
      throw new SnowflockError('E_CLOSED', 'the caller has gone');
    }
    const handle = this.#next++;
    this.#open.set(handle, { value, end: () => end(value) });
    const { socket, export_name, size_bytes } = value;
    return { socket, export_name, size_bytes, handle };
  }

  /** Takes one out; it is the caller's to end. E_NOT_FOUND. */
  take(handle: number): { value: ImportTarget | OpenView; end: () => Promise<void> } {
    const found = this.#open.get(handle);
    if (found === undefined) {
      throw new SnowflockError('E_NOT_FOUND', `nothing is open as ${handle} on this connection`);
    }
    this.#open.delete(handle);
    return found;
  }
}

/** Answers on the control socket until closed; what connections have open is ended with them. */
export function listenForControl(
  service: StoreService,
  log: Logger,
): Promise<{ close(): Promise<void> }> {
  const connections = new WeakMap<Caller, Handles>();
  const of = (caller: Caller): Handles => {
    let handles = connections.get(caller);
    if (handles === undefined) {
      handles = new Handles(caller, (error) =>
        log.error({ error: String(error) }, 'what a caller left open could not be removed'),
      );
      connections.set(caller, handles);
    }
    return handles;
  };
  const nothing = async (work: Promise<void>): Promise<Record<string, never>> => {
    await work;
    return {};
  };
  return RpcServer.listen<ControlMethods>(
    controlSocket(service.directory),
    {
      hello: () => ({ pid: process.pid, directory: service.directory }),
      createDisk: (p) => service.createDisk(p),
      cloneFromSource: ({ name, source }) =>
        service.cloneFromSource({ name, source: checkSource(source, 'the source') }),
      clone: (p) => service.clone(p),
      snapshot: (p) => service.snapshot(p),
      removeGeneration: (p) => nothing(service.removeGeneration(p)),
      removeDisk: (p) => nothing(service.removeDisk(p)),
      rollback: (p) => nothing(service.rollback(p)),
      flatten: async (p, caller) => {
        const gone = new AbortController();
        const abort = () => gone.abort();
        caller.closed.once('closed', abort);
        try {
          return await nothing(service.flatten({ ...p, signal: gone.signal }));
        } finally {
          caller.closed.off('closed', abort);
        }
      },
      commit: (p) => service.commit(p),
      list: () => service.list(),
      usage: () => service.usage(),
      tasks: () => service.tasks(),
      settled: () => nothing(service.settled()),
      beginImport: (p, caller) =>
        of(caller).add(
          () => service.beginImport(p),
          (target) => target.abandon(),
        ),
      finishImport: async ({ handle }, caller) => {
        const { value, end } = of(caller).take(handle);
        if (!('finish' in value)) {
          await end();
          throw new SnowflockError('E_ARGUMENT', `${handle} is not an import; it was closed`);
        }
        try {
          return await value.finish();
        } catch (error) {
          await end();
          throw error;
        }
      },
      abandonImport: ({ handle }, caller) => nothing(of(caller).take(handle).end()),
      openView: (p, caller) =>
        of(caller).add(
          () => service.openView(p),
          (view) => view.close(),
        ),
      closeView: ({ handle }, caller) => nothing(of(caller).take(handle).end()),
    },
    {
      name: `store ${service.directory}`,
      lineLimitBytes: CONTROL_CALL_BYTES,
      unreadLimitBytes: 2 * CONTROL_ANSWER_BYTES,
      maxConnections: CONTROL_CONNECTIONS,
      maxCalls: CONTROL_CALLS,
      check: checkControlCall,
    },
  );
}

type Client = RpcClient<ControlMethods>;

/** A store that another process serves. All errors are that process's, or E_SERVER. */
export class RemoteStore implements StoreService {
  readonly #client: Client;
  readonly directory: string;

  private constructor(client: Client, directory: string) {
    this.#client = client;
    this.directory = directory;
  }

  /** E_SERVER if nobody serves the store. */
  static async connect(directory: string): Promise<RemoteStore> {
    const client: Client = await RpcClient.connect(controlSocket(directory), {
      name: `the process that serves ${directory}`,
      lineLimitBytes: CONTROL_ANSWER_BYTES,
      lost: 'E_SERVER',
    });
    return new RemoteStore(client, directory);
  }

  /** Methods that do work as large as a disk take as long as they take. */
  #call<K extends keyof ControlMethods>(
    method: K,
    params: ControlMethods[K]['params'],
  ): Promise<ControlMethods[K]['result']> {
    const unbounded = method === 'flatten' || method === 'settled' || method === 'finishImport';
    return this.#client.call(method, params, unbounded ? null : 60_000);
  }

  createDisk(p: ControlMethods['createDisk']['params']) {
    return this.#call('createDisk', p);
  }
  cloneFromSource(p: ControlMethods['cloneFromSource']['params']) {
    return this.#call('cloneFromSource', p);
  }
  clone(p: ControlMethods['clone']['params']) {
    return this.#call('clone', p);
  }
  snapshot(p: ControlMethods['snapshot']['params']) {
    return this.#call('snapshot', p);
  }
  async removeGeneration(p: ControlMethods['removeGeneration']['params']): Promise<void> {
    await this.#call('removeGeneration', p);
  }
  async removeDisk(p: ControlMethods['removeDisk']['params']): Promise<void> {
    await this.#call('removeDisk', p);
  }
  async rollback(p: ControlMethods['rollback']['params']): Promise<void> {
    await this.#call('rollback', p);
  }
  /** The end of the connection is what aborts it. */
  async flatten(p: ControlMethods['flatten']['params'] & { signal?: AbortSignal }): Promise<void> {
    const { signal: _signal, ...params } = p;
    await this.#call('flatten', params);
  }
  commit(p: ControlMethods['commit']['params']): Promise<{ origin: string }> {
    return this.#call('commit', p);
  }
  list(): Promise<StoreListing> {
    return this.#call('list', {});
  }
  usage(): Promise<StoreUsage> {
    return this.#call('usage', {});
  }
  tasks(): Promise<StoreTask[]> {
    return this.#call('tasks', {});
  }
  async settled(): Promise<void> {
    await this.#call('settled', {});
  }

  async beginImport(p: ControlMethods['beginImport']['params']): Promise<ImportTarget> {
    const { handle, ...place } = await this.#call('beginImport', p);
    let open = true;
    return {
      ...place,
      finish: () => {
        open = false;
        return this.#call('finishImport', { handle });
      },
      abandon: async () => {
        if (!open) return;
        open = false;
        await this.#call('abandonImport', { handle });
      },
    };
  }

  async openView(p: ControlMethods['openView']['params']): Promise<OpenView> {
    const { handle, ...place } = await this.#call('openView', p);
    return {
      ...place,
      close: async () => {
        await this.#call('closeView', { handle });
      },
    };
  }

  async close(): Promise<void> {
    this.#client.close();
  }
}
