// The tests of clients.test.ts on the other engine, as where the kernel refuses io_uring.
process.env.SNOWFLOCK_IO_URING = '0';
await import('./clients.test.js');
