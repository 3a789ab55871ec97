import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { createConnection, createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { GuestChannel, type GuestIdentity } from '../../src/api/guest-channel.js';
import { projectRoot } from '../../src/common/native.js';

const execute = promisify(execFile);

async function compile(out: string, folders: string[], extra: string[] = []): Promise<void> {
  const files: string[] = [];
  for (const folder of folders) {
    for (const name of await readdir(join(projectRoot, folder))) {
      if (name.endsWith('.c')) files.push(join(projectRoot, folder, name));
    }
  }
  const include = ['-I', join(projectRoot, 'bindings/c')];
  const flags = ['-std=gnu17', '-D_GNU_SOURCE', '-O1', '-g', '-Wall', '-Wextra', '-Werror'];
  await execute('gcc', [...flags, ...extra, ...include, '-o', out, ...files]);
}

/**
 * The guest's programs compiled for this host. The agent, with sanitizers, writes its identity to
 * a file instead of taking it on, and has a Unix socket for a port. In place of QEMU stands a relay
 * between that socket and the host's, which a test can disconnect on the host's side, as a fork
 * and a restart of the daemon do.
 */
export class AgentRig {
  readonly folder: string;
  readonly hostSocket: string;
  readonly callSocket: string;
  readonly identityLog: string;
  readonly #servers: Server[] = [];
  readonly #channels: GuestChannel[] = [];
  #portServer: Server = createServer();
  #agent: ChildProcess | undefined;
  #port: Socket | undefined;
  #host: Socket | undefined;
  agentErrors = '';

  private constructor(folder: string) {
    this.folder = folder;
    this.hostSocket = join(folder, 'host.sock');
    this.callSocket = join(folder, 'calls.sock');
    this.identityLog = join(folder, 'identity.log');
  }

  static async start(): Promise<AgentRig> {
    const rig = new AgentRig(await mkdtemp(join(tmpdir(), 'sf-agent-')));
    try {
      await Promise.all([
        compile(join(rig.folder, 'sf-agent'), ['guest/agent'], ['-fsanitize=address,undefined']),
        compile(join(rig.folder, 'sf'), ['guest/tool', 'bindings/c']),
      ]);
      await rig.#listen(rig.hostSocket, (socket) => {
        // Like QEMU's: one connection, and output is lost while there is none.
        rig.#host?.destroy();
        rig.#host = socket;
        socket.on('data', (data) => {
          const port = rig.#port;
          if (!port || port.destroyed || port.write(data)) return;
          socket.pause();
          for (const event of ['drain', 'close']) port.once(event, () => socket.resume());
        });
      });
      rig.#portServer = await rig.#listen(join(rig.folder, 'port.sock'), (socket) => {
        rig.#port = socket;
        socket.on('data', (data) => {
          if (rig.#host && !rig.#host.destroyed && !rig.#host.write(data)) {
            socket.pause();
            rig.#host.once('drain', () => socket.resume());
          }
        });
      });
      await rig.startAgent();
      return rig;
    } catch (error) {
      await rig.stop();
      throw error;
    }
  }

  async #listen(path: string, accept: (socket: Socket) => void): Promise<Server> {
    const server = createServer((socket) => {
      socket.on('error', () => {});
      accept(socket);
    });
    this.#servers.push(server);
    server.listen(path);
    await once(server, 'listening');
    return server;
  }

  async startAgent(): Promise<void> {
    const connected = once(this.#portServer, 'connection');
    const agent = spawn(
      join(this.folder, 'sf-agent'),
      [
        ...['--port', `unix:${join(this.folder, 'port.sock')}`, '--socket', this.callSocket],
        ...['--identity-log', this.identityLog, '--console', '/dev/null'],
      ],
      { stdio: ['ignore', 'ignore', 'pipe'] },
    );
    this.#agent = agent;
    agent.stderr.on('data', (data: Buffer) => {
      this.agentErrors += data.toString();
    });
    await connected;
  }

  /** Ends the agent as init would see it die. */
  async killAgent(): Promise<void> {
    const agent = this.#agent;
    if (!agent || agent.exitCode !== null || agent.signalCode !== null) return;
    const exited = once(agent, 'exit');
    agent.kill('SIGKILL');
    await exited;
  }

  /** Bytes to the guest as if left there by an earlier host. */
  inject(bytes: string): void {
    this.#port?.write(bytes);
  }

  /** A new connection of the host; the one before is cut. */
  async channel(): Promise<GuestChannel> {
    const channel = new GuestChannel({ socketPath: this.hostSocket });
    this.#channels.push(channel);
    await channel.connect();
    return channel;
  }

  /** What the agent was last told of a step of its identity. */
  async identity(step: string): Promise<string[]> {
    const lines = (await readFile(this.identityLog, 'utf8')).split('\n');
    return lines.filter((l) => l.startsWith(`${step}=`)).map((l) => l.slice(step.length + 1));
  }

  /** A local program's connection to the agent. */
  async client(): Promise<LocalClient> {
    const socket = createConnection(this.callSocket);
    await once(socket, 'connect');
    return new LocalClient(socket);
  }

  /** Runs the shell tool. */
  async sf(...args: string[]): Promise<{ status: number; stdout: string; stderr: string }> {
    const env = { ...process.env, SNOWFLOCK_SOCKET: this.callSocket };
    const child = spawn(join(this.folder, 'sf'), args, { env, stdio: ['ignore', 'pipe', 'pipe'] });
    let stdout = '';
    let stderr = '';
    child.stdout.on('data', (data: Buffer) => {
      stdout += data.toString();
    });
    child.stderr.on('data', (data: Buffer) => {
      stderr += data.toString();
    });
    const [status] = (await once(child, 'close')) as [number];
    return { status, stdout, stderr };
  }

  async stop(): Promise<void> {
    for (const channel of this.#channels) channel.close();
    await this.killAgent();
    this.#port?.destroy();
    this.#host?.destroy();
    for (const server of this.#servers) server.close();
    await rm(this.folder, { recursive: true, force: true });
  }
}

/** One connection to the agent's socket, line by line. */
export class LocalClient {
  readonly #lines: string[] = [];
  readonly #waiting: ((line: string) => void)[] = [];
  #rest = '';

  constructor(readonly socket: Socket) {
    socket.on('error', () => {});
    socket.on('data', (data: Buffer) => {
      const parts = (this.#rest + data.toString()).split('\n');
      this.#rest = parts.pop() ?? '';
      for (const line of parts) {
        const waiting = this.#waiting.shift();
        if (waiting) waiting(line);
        else this.#lines.push(line);
      }
    });
  }

  async call(line: string): Promise<string> {
    this.socket.write(`${line}\n`);
    return await this.line();
  }

  async line(): Promise<string> {
    return this.#lines.shift() ?? (await new Promise((resolve) => this.#waiting.push(resolve)));
  }
}

let epochs = 0;

export function identityOf(vmid: number, epoch = `e${++epochs}`): GuestIdentity {
  return {
    epoch,
    vmid,
    family: 9,
    ip: `10.86.0.${2 + vmid}`,
    gateway: '10.86.0.1',
    hostname: `vm ${vmid}%`,
    seed: randomBytes(32).toString('hex'),
  };
}
