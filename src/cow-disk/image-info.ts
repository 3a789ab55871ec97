import { dirname, resolve } from 'node:path';
import { Type } from 'typebox';
import { Value } from 'typebox/value';
import { SnowflockError } from '../common/errors.js';
import { run } from '../common/run.js';

/** What is used of `qemu-img info --output=json` (QEMU, qapi/block-core.json: ImageInfo). */
const Info = Type.Object({
  format: Type.String(),
  'virtual-size': Type.Integer({ minimum: 0 }),
  'backing-filename': Type.Optional(Type.String()),
  'format-specific': Type.Optional(
    Type.Object({
      data: Type.Optional(
        Type.Object({
          'data-file': Type.Optional(Type.String()),
          extents: Type.Optional(Type.Array(Type.Object({ filename: Type.String() }))),
        }),
      ),
    }),
  ),
});

export interface ImageInfo {
  format: string;
  size_bytes: number;
  /** Files that the image makes QEMU read besides itself and those in its own folder. */
  elsewhere: string[];
}

/**
 * Looks at an image without opening what it stands on. An image can name any file of this host as its
 * backing file: who imports it says whether that is meant. `path` is absolute (QEMU takes `x:y` for
 * a protocol). Errors: E_ARGUMENT if it is no image, E_REQUIREMENT.
 */
export async function inspectImage(path: string, format?: string): Promise<ImageInfo> {
  const named = format === undefined ? [] : ['-f', format];
  let text: string;
  try {
    ({ stdout: text } = await run('qemu-img', ['info', '--output=json', ...named, path]));
  } catch (error) {
    if (error instanceof SnowflockError && error.code === 'E_IO') {
      throw new SnowflockError(
        'E_ARGUMENT',
        `${path} cannot be read as an image: ${error.message}`,
      );
    }
    throw error;
  }
  const info: unknown = JSON.parse(text);
  if (!Value.Check(Info, info)) {
    throw new SnowflockError('E_INTERNAL', `qemu-img info of ${path} is not understood`);
  }
  const data = info['format-specific']?.data;
  const folder = dirname(path);
  const files = [
    ...(data?.['data-file'] === undefined ? [] : [data['data-file']]),
    ...(data?.extents ?? []).map((extent) => extent.filename),
  ].filter((file) => dirname(resolve(folder, file)) !== folder);
  const backing = info['backing-filename'];
  return {
    format: info.format,
    size_bytes: info['virtual-size'],
    elsewhere: backing === undefined ? files : [backing, ...files],
  };
}
