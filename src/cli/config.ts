// Options of one command from the command line and a config file, merged and resolved.
// Knows no option by name: keys, checks and defaults are the option table's.

import { readFileSync } from 'node:fs';
import { extname } from 'node:path';
import { KeelgradError, show } from '../errors.js';
import {
  exclusiveOptions,
  flagNaming,
  flagOf,
  kebabCase,
  type Method,
  type Naming,
  normalizeKeys,
  type OptionKey,
  type Resolved,
  resolveOptions,
} from '../train/options.js';

type Given = Partial<Record<OptionKey, unknown>>;

function readText(path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    const reason = code === 'ENOENT' ? 'no such file' : message;
    throw new KeelgradError(`--config ${path}: cannot be read (${reason}); check the path`);
  }
}

async function parseText(path: string, text: string): Promise<unknown> {
  const extension = extname(path).toLowerCase();
  if (!['.json', '.yaml', '.yml'].includes(extension)) {
    const found = extension || 'no extension';
    throw new KeelgradError(`--config ${path}: expected a name that ends in .json, .yaml or .yml, found ${found}`);
  }
  try {
    if (extension === '.json') return JSON.parse(text);
    const { parse } = await import('yaml');
    return parse(text);
  } catch (error) {
    const language = extension === '.json' ? 'JSON' : 'YAML';
    throw new KeelgradError(`${path}: expected ${language}, found an error: ${(error as Error).message.trim()}`);
  }
}

/** The keys and values of a config file, as written. An empty file has none. */
export async function readConfig(path: string): Promise<Record<string, unknown>> {
  const value = (await parseText(path, readText(path))) ?? {};
  if (typeof value !== 'object' || Array.isArray(value)) {
    throw new KeelgradError(`${path}: expected option names with values, as "beta: 0.1", found ${show(value)}`);
  }
  return value as Record<string, unknown>;
}

const fileNaming = (path: string): Naming => ({
  option: (key) => `"${kebabCase(key)}"`,
  setting: (key, value) => `"${kebabCase(key)}: ${value}"`,
  written: (name) => `${path}: "${name}"`,
});

/** Names an option by where its value came from. */
function mergedNaming(path: string, given: Given, fromFile: Given): Naming {
  const isFromFile = (key: string): boolean => key in fromFile && !(key in given);
  return {
    ...flagNaming,
    option: (key) => (isFromFile(key) ? `${path}: "${kebabCase(key)}"` : flagOf(key)),
  };
}

/** The command line wins: over the same key, and over one that it replaces. */
function dropOverruled(given: Given, fromFile: Given): Given {
  const kept = { ...fromFile };
  for (const [one, other] of exclusiveOptions) {
    if (one in given) delete kept[other];
    if (other in given) delete kept[one];
  }
  return kept;
}

/** Resolves `given` (by camelCase key, as parsed from the command line) over the config file, if there is one. */
export async function gatherOptions<M extends Method>(
  method: M,
  given: Given,
  configPath: string | undefined,
): Promise<Resolved<M>> {
  if (configPath === undefined) return resolveOptions(method, given, { naming: flagNaming });
  const written = normalizeKeys(method, await readConfig(configPath), fileNaming(configPath));
  const fromFile = dropOverruled(given, written);
  const naming = mergedNaming(configPath, given, fromFile);
  return resolveOptions(method, { ...fromFile, ...given }, { naming });
}
