/**
 * The one table of error codes. A code is stable: scripts and other languages match on it. Each
 * message says what happened and to what; `help` says what to do. `exit` is the exit status of the
 * command line tool.
 */
const TABLE = {
  E_ARGUMENT: { exit: 2, help: 'Correct the argument; `--help` shows what is accepted.' },
  E_CONFIG: { exit: 2, help: 'Correct the configuration file.' },
  E_REQUIREMENT: { exit: 3, help: 'Run `npm run setup`, which installs what is missing.' },
  E_NOT_FOUND: { exit: 4, help: '`snowflock ps`, `image ls` and `disk ls` show what exists.' },
  E_IMAGE_UNKNOWN: { exit: 4, help: '`snowflock image ls` shows the images of this host.' },
  E_IN_USE: { exit: 5, help: 'Another process has it open; end that one first.' },
  E_EXISTS: { exit: 5, help: 'Choose another name, or remove the existing one first.' },
  E_STATE: { exit: 5, help: 'The object is in a state that does not allow this call.' },
  E_DAEMON: { exit: 6, help: 'Is sfld running on this host? Start it with `snowflock sfld`.' },
  E_SERVER: { exit: 6, help: 'What serves the store has ended; `snowflock disk serve` starts it.' },
  E_DATAPLANE: { exit: 6, help: 'The data plane is restarting; try again in a moment.' },
  E_PEER: { exit: 7, help: 'Check that sfld runs on the other host and the network reaches it.' },
  E_PEER_AUTH: { exit: 7, help: 'Both hosts need certificates of the same cluster.' },
  E_CAPACITY: { exit: 8, help: 'Ask for fewer or smaller ones, or add a host.' },
  E_TICKET_UNKNOWN: { exit: 9, help: 'Request a new ticket.' },
  E_TICKET_USED: { exit: 9, help: 'A ticket is good for one fork; request a new one.' },
  E_TICKET_EXPIRED: { exit: 9, help: 'Request a new ticket and use it before it expires.' },
  E_TICKET_OWNER: { exit: 9, help: 'A ticket can be used only by the VM that requested it.' },
  E_DESCRIPTOR: { exit: 10, help: 'The descriptor is cut short or altered; fork again.' },
  E_DESCRIPTOR_VERSION: { exit: 10, help: 'Run the same version of sfld on all hosts.' },
  E_SHAPE: { exit: 10, help: 'Descriptor and VM differ in machine shape or memory size.' },
  E_REPLICA_MISMATCH: { exit: 10, help: 'The file belongs to another generation; remove it.' },
  E_FORK: { exit: 11, help: 'The parent runs on; see the clone results for what failed.' },
  E_CLONE_START: { exit: 11, help: 'See the daemon log of the host named in the message.' },
  E_TIMEOUT: { exit: 12, help: 'The operation took longer than its limit; see the message.' },
  E_SOURCE_LOST: {
    exit: 13,
    help: 'What held these pages does not answer; start it again, or fork again.',
  },
  E_QEMU: { exit: 14, help: 'See the VM log named in the message.' },
  E_GUEST: { exit: 15, help: 'The guest agent did not answer; look at `snowflock console`.' },
  E_NETWORK: { exit: 16, help: 'Network set-up failed; the message names the command.' },
  E_USERFAULTFD: { exit: 17, help: 'Needs Linux 6.1 or newer with CONFIG_USERFAULTFD.' },
  E_BPF: { exit: 17, help: 'Needs Linux 6.1 or newer with BPF and BTF, and root.' },
  E_IO: { exit: 18, help: 'A file could not be read or written; the message names it.' },
  E_NO_SPACE: { exit: 18, help: 'Free space on the file system named in the message.' },
  E_CORRUPT: { exit: 18, help: 'The file fails its check; restore it or remove the disk.' },
  E_CLOSED: { exit: 19, help: 'The object was closed while the call was under way.' },
  E_INTERNAL: { exit: 70, help: 'This is a defect; please report it with the daemon log.' },
  E_INTERRUPTED: { exit: 130, help: 'Interrupted; what was started has been ended.' },
} as const;

export type ErrorCode = keyof typeof TABLE;

/** An error with a stable code. `message` says what happened, to what; `help` what to do. */
export class SnowflockError extends Error {
  override readonly name = 'SnowflockError';
  constructor(
    readonly code: ErrorCode,
    message: string,
    options?: { cause?: unknown },
  ) {
    super(message, options);
  }
  get help(): string {
    return TABLE[this.code].help;
  }
  get exitStatus(): number {
    return TABLE[this.code].exit;
  }
  toJSON(): { code: ErrorCode; message: string; help: string } {
    return { code: this.code, message: this.message, help: this.help };
  }
}

export function isErrorCode(code: unknown): code is ErrorCode {
  return typeof code === 'string' && Object.hasOwn(TABLE, code);
}

/** Anything thrown, as a SnowflockError: codes of the table are kept, all else is `fallback`. */
export function asSnowflockError(
  error: unknown,
  fallback: ErrorCode = 'E_INTERNAL',
): SnowflockError {
  if (error instanceof SnowflockError) return error;
  const message = error instanceof Error ? error.message : String(error);
  const code = error instanceof Error && 'code' in error ? error.code : undefined;
  return new SnowflockError(isErrorCode(code) ? code : fallback, message, { cause: error });
}

export const errorTable: Readonly<Record<ErrorCode, { exit: number; help: string }>> = TABLE;
