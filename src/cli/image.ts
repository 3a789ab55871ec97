import type { Command } from 'commander';
import { Argument } from 'commander';
import { buildImage } from '../image/build.js';
import { defaultImageDir, listImages } from '../image/images.js';
import { mib, note, printJson, table } from './output.js';

export function addImageCommands(program: Command): void {
  const image = program.command('image').description('guest images');
  const json = (): boolean => program.opts<{ json?: boolean }>().json === true;

  image
    .command('build')
    .description('build a guest image from Debian packages; does nothing if it is up to date')
    .addArgument(
      new Argument('[name]', 'which image').choices(['minimal', 'debian']).default('minimal'),
    )
    .option('--dir <folder>', 'where images are kept', defaultImageDir())
    .action(async (name: 'minimal' | 'debian', o: { dir: string }) => {
      const built = await buildImage(name, { cacheDir: o.dir, log: note });
      if (json()) printJson(built);
      else process.stdout.write(`${built.folder}\n`);
    });

  image
    .command('ls')
    .description('list the images of this host')
    .option('--dir <folder>', 'where images are kept', defaultImageDir())
    .action(async (o: { dir: string }) => {
      const images = await listImages(o.dir);
      if (json()) printJson(images.map((one) => one.manifest));
      else {
        const rows = images.map(({ manifest: one }) => [
          one.name,
          one.version,
          mib(one.disk_bytes),
        ]);
        process.stdout.write(`${table(['name', 'version', 'disk'], rows)}\n`);
      }
    });
}
