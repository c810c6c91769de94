// Typed reads of a JSON object's fields, with errors that name file and field.
// Knows no file format; never changes the object.

import { isDeepStrictEqual } from 'node:util';
import { KeelgradError, show } from '../errors.js';

export const isRecord = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

/** Typed, range-checked reads of one JSON object. `null` counts as absent, as it does in transformers. */
export class Fields {
  readonly source: string;
  readonly object: Readonly<Record<string, unknown>>;
  private readonly prefix: string;

  /** `source` and `prefix` are what messages put before a field's name: the file, and the path inside it. */
  constructor(source: string, object: Readonly<Record<string, unknown>>, prefix = '') {
    this.source = source;
    this.object = object;
    this.prefix = prefix;
  }

  error(name: string, expected: string): KeelgradError {
    const found = show(this.object[name]);
    return new KeelgradError(`${this.source}: ${this.prefix}${name}: expected ${expected}, found ${found}`);
  }

  has(name: string): boolean {
    return this.object[name] !== undefined && this.object[name] !== null;
  }

  read<T>(name: string, fallback: T | undefined, expected: string, accepts: (value: unknown) => value is T): T {
    if (!this.has(name)) {
      if (fallback !== undefined) return fallback;
      throw this.error(name, expected);
    }
    const value = this.object[name];
    if (!accepts(value)) throw this.error(name, expected);
    return value;
  }

  count(name: string, fallback?: number): number {
    const accepts = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) > 0;
    return this.read(name, fallback, 'a positive integer', accepts);
  }

  positive(name: string, fallback?: number): number {
    const accepts = (value: unknown): value is number => Number.isFinite(value) && (value as number) > 0;
    return this.read(name, fallback, 'a positive number', accepts);
  }

  flag(name: string, fallback: boolean): boolean {
    return this.read(name, fallback, 'true or false', (value): value is boolean => typeof value === 'boolean');
  }

  text(name: string, fallback?: string): string {
    return this.read(name, fallback, 'a string', (value): value is string => typeof value === 'string');
  }

  /** Refuses a switch that changes the numbers, unless it stands at the value that does nothing. */
  inert(name: string, values: readonly unknown[], what: string): void {
    if (!this.has(name) || values.some((value) => isDeepStrictEqual(value, this.object[name]))) return;
    throw new KeelgradError(`${this.source}: ${this.prefix}${name} is ${show(this.object[name])}: ${what}`);
  }
}
