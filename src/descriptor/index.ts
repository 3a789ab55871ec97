export { checkShape } from './check-shape.js';
export {
  DESCRIPTOR_VERSION,
  decodeDescriptor,
  encodeDescriptor,
  MAX_DESCRIPTOR_BYTES,
} from './codec.js';
export type {
  Descriptor,
  DescriptorHeader,
  GenerationRef,
  NetworkIdentity,
  PageSource,
} from './schema.js';
export { bitmapBytes } from './zero-map.js';
