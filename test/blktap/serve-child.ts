// A process that opens a disk and serves it until it is killed: DIRECTORY SOCKET.
// Prints one JSON line when it serves; on each line of input forks as the generation it names; at its end closes the disk.
import { createInterface } from 'node:readline';
import { Disk } from '../../src/cow-disk/disk.js';

const [directory, socketPath] = process.argv.slice(2);
if (directory === undefined || socketPath === undefined) throw new Error('DIRECTORY SOCKET');
const disk = await Disk.open(directory);
await disk.serve({ socketPath, exportName: 'disk' });
console.log(JSON.stringify({ pid: process.pid, generations: disk.info().generations }));
for await (const line of createInterface({ input: process.stdin })) {
  console.log(JSON.stringify(await disk.fork(line.trim())));
}
await disk.close();
