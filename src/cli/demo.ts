// `keelgrad demo`.
import type { DemoOptions } from '../train/options.js';
import type { DemoContext } from './io.js';
export async function runDemo(_options: DemoOptions, _context: DemoContext): Promise<void> {}
