export * from './codec.js';
export * from './error.js';
export * from './options.js';
