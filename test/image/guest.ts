import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { GuestChannel } from '../../src/api/guest-channel.js';
import { projectRoot } from '../../src/common/native.js';
import { tscKhz } from '../../src/common/tsc.js';
import { type BuiltImage, kernelCommandLine } from '../../src/image/manifest.js';

/** Where the tests and the demo keep images. */
export const imageCache = join(projectRoot, '.cache/images');

/** A guest in a plain QEMU: the image as it is, changes to its disk dropped at the end. */
export class BootedGuest {
  channel: GuestChannel;
  readonly #qemu: ChildProcess;
  readonly #folder: string;
  #errors = '';

  private constructor(folder: string, qemu: ChildProcess) {
    this.#folder = folder;
    this.#qemu = qemu;
    qemu.stderr?.on('data', (data: Buffer) => {
      this.#errors += data.toString();
    });
    this.channel = new GuestChannel({ socketPath: join(folder, 'channel.sock') });
  }

  static async boot(image: BuiltImage): Promise<BootedGuest> {
    const folder = await mkdtemp(join(tmpdir(), 'sf-boot-'));
    const qemu = spawn(
      'qemu-system-x86_64',
      [
        ...['-M', 'microvm', '-accel', 'tcg', '-m', '512', '-smp', '1', '-nodefaults'],
        ...['-no-user-config', '-nographic', '-no-reboot', '-monitor', 'none'],
        ...['-kernel', image.kernelPath, '-initrd', image.initrdPath],
        ...['-append', kernelCommandLine(image.manifest, await tscKhz())],
        ...['-drive', `id=disk,if=none,format=raw,snapshot=on,file=${image.diskPath}`],
        ...['-device', 'virtio-blk-device,drive=disk', '-device', 'virtio-serial-device'],
        ...['-chardev', `socket,id=channel,path=${folder}/channel.sock,server=on,wait=off`],
        ...['-device', 'virtserialport,chardev=channel,name=org.snowflock.0'],
        ...['-netdev', 'hubport,id=net,hubid=0', '-device', 'virtio-net-device,netdev=net'],
        ...['-serial', `file:${folder}/console.log`],
      ],
      { stdio: ['ignore', 'ignore', 'pipe'] },
    );
    const guest = new BootedGuest(folder, qemu);
    try {
      await Promise.race([
        guest.channel.connect({ timeoutMs: 30_000 }),
        once(qemu, 'exit').then(() => {
          throw new Error(`QEMU ended: ${guest.#errors}`);
        }),
      ]);
      return guest;
    } catch (error) {
      await guest.end();
      throw error;
    }
  }

  /** A new connection, as a clone's host or a restarted daemon makes it. */
  async reconnect(): Promise<GuestChannel> {
    this.channel.close();
    this.channel = new GuestChannel({ socketPath: join(this.#folder, 'channel.sock') });
    await this.channel.connect();
    return this.channel;
  }

  async shell(script: string): Promise<string> {
    const session = this.channel.exec({ argv: ['sh', '-c', script] });
    session.stdin.end();
    const [stdout, stderr, exit] = await Promise.all([
      text(session.stdout),
      text(session.stderr),
      session.exited,
    ]);
    if (exit.status !== 0) throw new Error(`${script}: ${JSON.stringify(exit)} ${stderr}`);
    return stdout;
  }

  async console(): Promise<string> {
    return await readFile(join(this.#folder, 'console.log'), 'utf8');
  }

  async end(): Promise<void> {
    this.channel.close();
    if (this.#qemu.exitCode === null && this.#qemu.signalCode === null) {
      const exited = once(this.#qemu, 'exit');
      this.#qemu.kill('SIGKILL');
      await exited;
    }
    await rm(this.#folder, { recursive: true, force: true });
  }
}
