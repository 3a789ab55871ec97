import { type Command, Option } from 'commander';
import { exportDisk } from '../cow-disk/export.js';
import { importDisk } from '../cow-disk/import.js';
import { IMAGE_FORMATS, type ImageFormat } from '../cow-disk/transfer.js';
import { diskSize, parseDisk, parseDiskName } from './disk-names.js';
import { withStore } from './disk-open.js';
import { note, printJson } from './output.js';
import { interruptible, Progress } from './progress.js';

/** Commands that copy whole disks in and out. */
export function addDiskCopyCommands(disk: Command, json: () => boolean): void {
  disk
    .command('import')
    .description('make a disk from an image, a folder, an archive or standard input')
    .argument(
      '<source>',
      'image, folder or tar of a root file system, block device; - : raw, stdin',
    )
    .argument('<disk>', 'STORE/DISK; the store is made if it is missing')
    .addOption(
      new Option('--format <format>', 'what the source is (default: found out)').choices([
        ...IMAGE_FORMATS,
        'tar',
      ]),
    )
    .option(
      '--size <size>',
      'MiB unless a unit is given (default: what the source needs)',
      diskSize,
    )
    .option('--allow-backing', 'the image may read other files of this host (backing files)')
    .action(
      async (
        source: string,
        text: string,
        o: { format?: ImageFormat | 'tar'; size?: number; allowBacking?: boolean },
      ) => {
        const { store, disk: name } = parseDisk(text);
        const made = await interruptible((signal) =>
          withStore(
            store,
            (open) =>
              withProgress(`import ${name}`, o.size, (progress) =>
                importDisk(open, {
                  source,
                  name,
                  signal,
                  progress,
                  ...(o.format === undefined ? {} : { format: o.format }),
                  ...(o.size === undefined ? {} : { sizeBytes: o.size }),
                  ...(o.allowBacking === undefined ? {} : { allowBacking: o.allowBacking }),
                }),
              ),
            { create: true },
          ),
        );
        if (json()) printJson(made);
        else process.stdout.write(`${made.name}\n`);
      },
    );

  disk
    .command('export')
    .description('write a disk or a generation into a file, holes as holes')
    .argument('<disk>', 'STORE/DISK[@GENERATION]; a disk alone: what it holds now')
    .argument('<file>', '- : raw, to standard output')
    .addOption(new Option('--format <format>', 'of the file').choices(IMAGE_FORMATS).default('raw'))
    .option('--force', 'replace an existing file')
    .action(async (text: string, file: string, o: { format: ImageFormat; force?: boolean }) => {
      const { store, disk: name, generation } = parseDiskName(text);
      const done = await interruptible((signal) =>
        withStore(store, (open) =>
          withProgress(`export ${name}`, undefined, (progress) =>
            exportDisk(open, {
              disk: name,
              generation,
              file,
              format: o.format,
              force: o.force === true,
              signal,
              progress,
            }),
          ),
        ),
      );
      if (file === '-') return;
      if (json()) printJson({ file, format: o.format, ...done });
      else note(`wrote ${file}`);
    });
}

async function withProgress<T>(
  what: string,
  totalBytes: number | undefined,
  work: (progress: (share: number) => void) => Promise<T>,
): Promise<T> {
  const progress = new Progress(what, totalBytes);
  let share: number | undefined;
  // Tools report in steps: between them the line still has to move.
  const timer = setInterval(() => progress.update(share), 500);
  try {
    return await work((now) => {
      share = now;
    });
  } finally {
    clearInterval(timer);
    progress.end();
  }
}
