import { destination, type Logger, pino } from 'pino';

export type { Logger };

/**
 * The process's logger: JSON lines on stderr, so that stdout stays free for data. Level from
 * `SNOWFLOCK_LOG` (trace, debug, info, warn, error; default info).
 */
export function createLogger(name: string): Logger {
  return pino(
    { name, level: process.env.SNOWFLOCK_LOG ?? 'info', base: { name, pid: process.pid } },
    destination({ fd: 2, sync: true }),
  );
}
