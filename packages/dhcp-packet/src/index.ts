export * from './codec.js';
export * from './error.js';
export * from './options.js';
export * from './relay.js';
export * from './routes.js';
export * from './search.js';
