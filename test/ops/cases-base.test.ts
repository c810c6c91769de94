// The case list on the portable kernels.
import { testInstructionSet } from '../support/isa.js';

testInstructionSet('base');
