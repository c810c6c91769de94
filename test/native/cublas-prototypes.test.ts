// How cuBLAS is declared and found, without a GPU: our prototypes against NVIDIA's headers, our symbols and attributes in the
// real library (both come with the pip package nvidia-cublas; KEELGRAD_TEST_CUBLAS or CUDA_HOME names its folder), and the
// loader's search and messages with stub libraries.
import { execFileSync, spawnSync } from 'node:child_process';
import { copyFileSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

const root = resolve(import.meta.dirname, '..', '..');
const native = join(root, 'native');
const sources = join(import.meta.dirname, 'cublas');
const compiler = process.env.CXX ?? 'c++';
const cudaHome = process.env.KEELGRAD_TEST_CUBLAS ?? process.env.CUDA_HOME ?? process.env.CUDA_PATH ?? '';
const headers = join(cudaHome, 'include');
const hasHeaders = cudaHome !== '' && existsSync(join(headers, 'cublasLt.h'));
const realLibraries = ['lib64', 'lib'].flatMap((folder) =>
  ['libcublasLt.so.13', 'libcublasLt.so.12'].map((name) => join(cudaHome, folder, name)),
);
const real = cudaHome === '' ? undefined : realLibraries.find((file) => existsSync(file));
/** In CI nothing is left out for want of them (.ci/run installs both). */
const inCi = process.env.CI === 'true';
const able = process.platform === 'linux' && spawnSync(compiler, ['--version']).status === 0;

interface Found {
  available: boolean;
  reason: string;
  remedy: string;
  path: string;
  version: number;
}

describe.skipIf(!able || !(hasHeaders || inCi))(
  "declarations against NVIDIA's headers (needs CUDA_HOME/include/cublasLt.h)",
  () => {
    const check = (file: string): { status: number | null; stderr: string } => {
      const flags = ['-std=c++17', '-fsyntax-only', `-I${native}`, '-isystem', headers];
      return spawnSync(compiler, [...flags, file], { encoding: 'utf8' });
    };

    it('agree in prototypes, enumerators and structures', () => {
      const { status, stderr } = check(join(sources, 'prototypes.cc'));
      expect(stderr).toBe('');
      expect(status).toBe(0);
    });

    it('are told apart where they differ', () => {
      const folder = mkdtempSync(join(tmpdir(), 'keelgrad-cublas-'));
      const source = readFileSync(join(sources, 'prototypes.cc'), 'utf8');
      const file = join(folder, 'wrong.cc');
      writeFileSync(
        file,
        `${source}
      static_assert(!Alike<lt::Status (*)(lt::Handle, int), decltype(&cublasLtDestroy)>::value, "count");
      static_assert(!Alike<lt::Status (*)(const lt::HandleOpaque*), size_t (*)(void*)>::value, "result");
      static_assert(!Alike<void (*)(const int*), void (*)(int*)>::value, "const");
      static_assert(!Alike<void (*)(int32_t), void (*)(uint64_t)>::value, "width");
      CHECK(lt::Epilogue::Bias, CUBLASLT_EPILOGUE_RELU);`,
      );
      const { stderr } = check(file);
      rmSync(folder, { recursive: true });
      expect(stderr.match(/error:/g)).toHaveLength(1);
      expect(stderr).toContain('CUBLASLT_EPILOGUE_RELU');
    });
  },
);

describe.skipIf(!able)('the loader (needs a C++ compiler on Linux)', () => {
  const folder = mkdtempSync(join(tmpdir(), 'keelgrad-cublas-'));
  const loader = join(folder, 'loader');
  const symbols = [...readFileSync(join(native, 'cuda', 'cublas.h'), 'utf8').matchAll(/^ {2}X\([^,]+, (\w+),/gm)].map(
    (match) => `cublasLt${match[1]}`,
  );

  beforeAll(() => {
    const files = [join(sources, 'loader.cc'), join(native, 'cuda', 'cublas.cc'), join(native, 'runtime', 'error.cc')];
    execFileSync(compiler, ['-std=c++17', `-I${native}`, ...files, '-ldl', '-o', loader]);
  });
  afterAll(() => rmSync(folder, { recursive: true }));

  /** A library that has these symbols and says it is this version. */
  function stub(file: string, version: number, names: readonly string[] = symbols): string {
    const source = join(folder, 'stub.c');
    const functions = names.map((name) => `unsigned long ${name}(void) { return ${version}; }`);
    mkdirSync(resolve(file, '..'), { recursive: true });
    writeFileSync(source, functions.join('\n'));
    execFileSync(compiler, ['-x', 'c', '-shared', '-fPIC', source, '-o', file]);
    return file;
  }

  function find(env: Record<string, string>, ...args: string[]): Found & { output: string; status: number | null } {
    const { stdout, status } = spawnSync(loader, args, { env: { HOME: folder, ...env }, encoding: 'utf8' });
    const [first, ...rest] = stdout.split('\n');
    return { ...(JSON.parse(first) as Found), output: rest.join('\n'), status };
  }

  const at = (...parts: string[]): string => join(folder, ...parts);

  it('resolves the symbols that the engine calls', () => {
    expect(symbols).toContain('cublasLtMatmul');
    expect(symbols.length).toBe(16);
  });

  it('takes a folder or a file from KEELGRAD_CUBLAS, 13 before 12', () => {
    stub(at('both', 'libcublasLt.so.12'), 120_803);
    expect(find({ KEELGRAD_CUBLAS: at('both') })).toMatchObject({ available: true, version: 120_803 });
    const newer = stub(at('both', 'libcublasLt.so.13'), 130_002);
    expect(find({ KEELGRAD_CUBLAS: at('both') })).toMatchObject({ available: true, path: newer, version: 130_002 });
    const file = stub(at('other', 'cublas.so'), 130_100);
    expect(find({ KEELGRAD_CUBLAS: file })).toMatchObject({ available: true, path: file });
  });

  it('names the symbol that a library lacks', () => {
    const kept = symbols.filter((name) => name !== 'cublasLtMatmulAlgoCheck');
    const file = stub(at('lacking', 'libcublasLt.so.13'), 130_000, kept);
    const found = find({ KEELGRAD_CUBLAS: at('lacking') });
    expect(found.available).toBe(false);
    expect(found.reason).toBe(
      `KEELGRAD_CUBLAS: ${file} is not a cuBLASLt of CUDA 12 or 13: it lacks cublasLtMatmulAlgoCheck`,
    );
    expect(found.remedy).toMatch(/pip install nvidia-cublas.*KEELGRAD_CUBLAS/);
  });

  it('says what is wrong with a path that the user named, and looks nowhere else', () => {
    const elsewhere = { CUDA_HOME: at('home') };
    stub(at('home', 'lib64', 'libcublasLt.so.13'), 130_000);
    mkdirSync(at('empty'));
    writeFileSync(at('text.so'), 'not a library');
    const reason = (path: string): string => {
      const found = find({ KEELGRAD_CUBLAS: path, ...elsewhere });
      expect(found.available).toBe(false);
      return found.reason;
    };
    expect(reason(at('nowhere'))).toBe(`KEELGRAD_CUBLAS: there is no file or folder ${at('nowhere')}`);
    expect(reason(at('empty'))).toBe(
      `KEELGRAD_CUBLAS: ${at('empty')} holds neither libcublasLt.so.13 nor libcublasLt.so.12`,
    );
    expect(reason(at('text.so'))).toMatch(/^KEELGRAD_CUBLAS: .*text\.so: .*(invalid ELF header|file too short)/);
    expect(reason(stub(at('old.so'), 110_502))).toBe(
      `KEELGRAD_CUBLAS: ${at('old.so')} is cuBLAS 11.5, older than 12.0`,
    );
  });

  it('asks the dynamic linker for the soname first', () => {
    const file = stub(at('linked', 'libcublasLt.so.13'), 130_007);
    const found = find({ LD_LIBRARY_PATH: at('linked'), CUDA_HOME: at('home') });
    expect(found).toMatchObject({ available: true, path: file, version: 130_007 });
  });

  // Where the system has a cuBLAS of its own, the dynamic linker finds that one first.
  const system = (): boolean => find({ HOME: '/nonexistent' }).available;

  it('says so where there is none', (context) => {
    if (system()) context.skip();
    const found = find({});
    expect(found.reason).toBe('cuBLAS was not found (libcublasLt.so.13, libcublasLt.so.12)');
    expect(found.remedy).toContain('libcublasLt.so.13 or libcublasLt.so.12');
  });

  it('looks into CUDA_HOME, CUDA_PATH and the folders of pip', (context) => {
    if (system()) context.skip();
    const library = stub(at('made.so'), 130_001);
    const places: [variable: string, value: string, folder: string[]][] = [
      ['CUDA_HOME', at('a'), ['a', 'lib64']],
      ['CUDA_PATH', at('b'), ['b', 'lib']],
      ['CUDA_HOME', at('nvidia', 'cuda_runtime'), ['nvidia', 'cublas', 'lib']],
      ['VIRTUAL_ENV', at('venv'), ['venv', 'lib', 'python3.11', 'site-packages', 'nvidia', 'cublas', 'lib']],
      ['CONDA_PREFIX', at('conda'), ['conda', 'lib']],
      ['HOME', at('user'), ['user', '.local', 'lib', 'python3.12', 'site-packages', 'nvidia', 'cu13', 'lib']],
    ];
    for (const [variable, value, parts] of places) {
      mkdirSync(at(...parts), { recursive: true });
      mkdirSync(value, { recursive: true });
      copyFileSync(library, at(...parts, 'libcublasLt.so.13'));
      expect(find({ [variable]: value }), variable).toMatchObject({ available: true, version: 130_001 });
    }
  });

  it('goes on behind a library that will not do, and tells of it where no other is found', (context) => {
    if (system()) context.skip();
    const bad = stub(at('bad', 'lib64', 'libcublasLt.so.13'), 130_000, ['cublasLtCreate']);
    stub(at('good', 'lib64', 'libcublasLt.so.12'), 120_000);
    expect(find({ CUDA_HOME: at('bad'), CUDA_PATH: at('good') })).toMatchObject({ available: true, version: 120_000 });
    expect(find({ CUDA_HOME: at('bad') }).reason).toBe(
      `cuBLAS: ${bad} is not a cuBLASLt of CUDA 12 or 13: it lacks cublasLtGetVersion`,
    );
  });

  it.skipIf(!real && !inCi)(
    'opens the real library and makes every descriptor that is used (needs CUDA_HOME/lib/libcublasLt)',
    () => {
      expect(real, 'a libcublasLt below KEELGRAD_TEST_CUBLAS or CUDA_HOME').toBeDefined();
      const found = find({ KEELGRAD_CUBLAS: real ?? '' }, 'descriptors');
      expect(found.output).toBe('');
      expect(found).toMatchObject({ available: true, path: real, status: 0 });
      expect(found.version).toBeGreaterThanOrEqual(120_000);
    },
    60_000,
  );
});
