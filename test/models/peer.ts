// The Python of the peers (torch, transformers, peft), for tests that hold our files against theirs.
import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { describe } from 'vitest';

const python = process.env.KEELGRAD_PEER_PYTHON;
const script = join(import.meta.dirname, '..', 'fixtures', 'reference.py');

/** `describe` that needs the peers' Python; skipped with a printed reason where there is none. */
export function describeWithPeers(name: string, body: () => void): void {
  if (python && existsSync(python)) {
    describe(name, { timeout: 300_000 }, body);
    return;
  }
  const how = 'set KEELGRAD_PEER_PYTHON to a Python with torch, transformers and peft';
  console.warn(`skipped: ${name}: ${how}`);
  describe.skip(`${name} (${how})`, body);
}

/** The JSON that a command of fixtures/reference.py prints. */
// biome-ignore lint/suspicious/noExplicitAny: each command has its own answer
export function askPeers(command: readonly string[], input: unknown = null): Promise<any> {
  return new Promise((resolve, reject) => {
    const options = { maxBuffer: 1 << 28, env: { ...process.env, HF_HUB_OFFLINE: '1' } };
    const child = execFile(python!, [script, ...command], options, (error, stdout, stderr) => {
      if (error) reject(new Error(`reference.py ${command.join(' ')}: ${stderr.slice(-2000)}`));
      else resolve(JSON.parse(stdout.slice(stdout.lastIndexOf('\n', stdout.length - 2) + 1)));
    });
    child.stdin!.end(JSON.stringify(input));
  });
}
