// Merges in a process that is to be killed: JSON of { directory, sizeBytes, slices, until }. Prints a
// line when it is as far as `until` says, and then waits.
import { addon, type SliceRef } from '../../src/cow-disk/native.js';

const { directory, sizeBytes, slices, until } = JSON.parse(process.argv[2] ?? '') as {
  directory: string;
  sizeBytes: number;
  slices: SliceRef[];
  until: 'step' | 'prepare' | 'apply';
};
const store = await addon().openStore(directory);
const merge = await store.mergeBegin({ slices, sizeBytes });
let done = false;
do {
  done = (await merge.step(16 * 1024)).done;
} while (!done && until !== 'step');
const result = until === 'step' ? {} : await merge.prepare();
if (until === 'apply') await merge.apply();
console.log(JSON.stringify(result));
process.stdin.resume();
