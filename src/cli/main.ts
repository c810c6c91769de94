#!/usr/bin/env node
// The executable: hands the process over to the command line and takes its exit code.
// Owns nothing but that; sets the code instead of exiting, so that output is written to the end.

import { main } from './program.js';

// A reader that closes the pipe early (`| head`) has what it wants.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code === 'EPIPE') process.exit(0);
  throw error;
});
// One that closes only the notes must not cost a run its weights: it goes on without being watched.
process.stderr.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code !== 'EPIPE') throw error;
});

const { stdout, stderr, env } = process;
main(process.argv.slice(2), { stdout, stderr, env, signals: process, exit: (code) => process.exit(code) }).then(
  (code) => {
    process.exitCode = code;
  },
);
