// Runs a command as root: as it is when this is root, else through sudo with the same PATH (tests
// and the demo make network namespaces).
//
//   node scripts/as-root.mjs COMMAND [ARGUMENT…]
import { spawn } from 'node:child_process';
import { asRoot } from './lib/run.mjs';

// A login's PATH has no sbin folders, where ip, nft and bridge are.
const path = `${process.env.PATH ?? ''}:/usr/local/sbin:/usr/sbin:/sbin`;
const inner = process.argv.slice(2);
const isRoot = process.getuid?.() === 0;
const argv = asRoot(isRoot ? inner : ['env', `PATH=${path}`, ...inner]);
if (!argv) {
  process.stderr.write(`this needs root or sudo; as root run: ${inner.join(' ')}\n`);
  process.exit(3);
}
if (!isRoot) process.stderr.write('network namespaces need root: using sudo\n');
const [command = '', ...args] = argv;
const child = spawn(command, args, { stdio: 'inherit', env: { ...process.env, PATH: path } });
// Ctrl-C reaches the command by itself; this process waits for how it ends.
for (const signal of /** @type {const} */ (['SIGINT', 'SIGTERM', 'SIGHUP'])) {
  process.on(signal, () => {
    if (signal !== 'SIGINT') child.kill(signal);
  });
}
child.on('error', (error) => {
  process.stderr.write(`${command}: ${error.message}\n`);
  process.exit(127);
});
child.on('close', (status, signal) => {
  process.exit(status ?? (signal === 'SIGINT' ? 130 : 143));
});
