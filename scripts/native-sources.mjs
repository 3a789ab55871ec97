// Prints the C++ sources of the named folders of native/, one a line, for binding.gyp.
import { existsSync, readdirSync } from 'node:fs';

for (const name of process.argv.slice(2)) {
  const folder = `native/${name}`;
  if (!existsSync(folder)) continue;
  for (const file of readdirSync(folder).sort()) {
    if (file.endsWith('.cc')) console.log(`${folder}/${file}`);
  }
}
