// The case list on the AVX2 kernels.
import { testInstructionSet } from '../support/isa.js';

testInstructionSet('avx2');
